/* How an adapter's B is laid out for the loops of few_rows.c, from type FROM to type TO.
 *
 * to[k][row] = from[row][k] * factor in float32, rounded once; B has `rows` rows of `ranks` values. */
void NAME(const FROM *from, int64_t rows, int64_t ranks, float factor, TO *to) {
    f32x16 tile[LANES];
    for (int64_t k = 0; k < ranks; k += LANES) {
        int64_t width = least(LANES, ranks - k);
        for (int64_t r = 0; r < rows; r += LANES) {
            int64_t height = least(LANES, rows - r);
            const FROM *source = from + r * ranks + k;
            TO *target = to + k * rows + r;
            if (height < LANES || width < LANES) {
                for (int64_t i = 0; i < height; i++)
                    for (int64_t j = 0; j < width; j++)
                        SET(target + j * rows + i, ONE(source + i * ranks + j) * factor);
                continue;
            }
            for (int i = 0; i < LANES; i++) tile[i] = LOAD(source + i * ranks) * factor;
            transpose_tile(tile);
            for (int j = 0; j < LANES; j++) STORE(target + j * rows, tile[j]);
        }
    }
}
#undef NAME
#undef FROM
#undef LOAD
#undef ONE
#undef TO
#undef STORE
#undef SET
