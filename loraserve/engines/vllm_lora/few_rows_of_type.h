/* The loops of few_rows.c for one type T of weights, inputs and outputs. */

/* hidden[row][k] = A[k] . x[row] for rank rows k0 to k1; x is float32 already. */
static void NAME(shrink)(const T *a, int64_t width, int64_t k0, int64_t k1, const float *x, int64_t rows,
                         float *hidden, int64_t ranks) {
    for (int64_t k = k0; k < k1; k += BLOCK) {
        const T *ap[BLOCK];
        for (int i = 0; i < BLOCK; i++) ap[i] = a + least(k + i, k1 - 1) * width;
        for (int64_t m = 0; m < rows; m += BLOCK) {
            const float *xp[BLOCK];
            f32x16 sums[BLOCK][BLOCK];
            float tail[BLOCK][BLOCK];
            memset(sums, 0, sizeof sums);
            memset(tail, 0, sizeof tail);
            for (int j = 0; j < BLOCK; j++) xp[j] = x + least(m + j, rows - 1) * width;
            int64_t c = 0;
            for (; c + LANES <= width; c += LANES) {
                f32x16 xv[BLOCK];
                for (int j = 0; j < BLOCK; j++) xv[j] = load_float(xp[j] + c);
                for (int i = 0; i < BLOCK; i++) {
                    f32x16 av = NAME(load)(ap[i] + c);
                    for (int j = 0; j < BLOCK; j++) sums[i][j] += av * xv[j];
                }
            }
            for (; c < width; c++)
                for (int i = 0; i < BLOCK; i++)
                    for (int j = 0; j < BLOCK; j++) tail[i][j] += NAME(one)(ap[i] + c) * xp[j][c];
            for (int i = 0; i < BLOCK && k + i < k1; i++)
                for (int j = 0; j < BLOCK && m + j < rows; j++)
                    hidden[(m + j) * ranks + k + i] = sum16(sums[i][j]) + tail[i][j];
        }
    }
}

/* y[row][left + c] += sum of hidden[row][begin + k] * B[k][c] for columns c0 to c1 of one slice. */
static void NAME(expand)(const Slice *slice, int64_t c0, int64_t c1, const float *hidden, int64_t ranks,
                         int64_t rows, T *const *y) {
    const T *b = slice->b;
    int64_t width = slice->right - slice->left, depth = slice->end - slice->begin;
    for (int64_t m = 0; m < rows; m += BLOCK) {
        const float *hp[BLOCK];
        T *yp[BLOCK];
        int live = (int)least(BLOCK, rows - m);
        for (int j = 0; j < BLOCK; j++) {
            int64_t row = least(m + j, rows - 1);
            hp[j] = hidden + row * ranks + slice->begin;
            yp[j] = y[row] + slice->left;
        }
        int64_t c = c0;
        for (; c + COLUMNS <= c1; c += COLUMNS) {
            f32x16 sums[BLOCK][COLUMNS / LANES];
            for (int j = 0; j < BLOCK; j++)
                for (int v = 0; v < COLUMNS / LANES; v++) sums[j][v] = NAME(load)(yp[j] + c + v * LANES);
            for (int64_t k = 0; k < depth; k++) {
                f32x16 bv[COLUMNS / LANES];
                for (int v = 0; v < COLUMNS / LANES; v++) bv[v] = NAME(load)(b + k * width + c + v * LANES);
                for (int j = 0; j < BLOCK; j++) {
                    float h = hp[j][k];
                    for (int v = 0; v < COLUMNS / LANES; v++) sums[j][v] += bv[v] * h;
                }
            }
            for (int j = 0; j < live; j++)
                for (int v = 0; v < COLUMNS / LANES; v++) NAME(store)(yp[j] + c + v * LANES, sums[j][v]);
        }
        for (; c < c1; c++)
            for (int j = 0; j < live; j++) {
                float sum = NAME(one)(yp[j] + c);
                for (int64_t k = 0; k < depth; k++) sum += hp[j][k] * NAME(one)(b + k * width + c);
                NAME(set)(yp[j] + c, sum);
            }
    }
}

/* All spans of a step for one layer. `order` NULL: spans count y's own rows. `scratch` holds, per row of the
 * spans, its x and its hidden values as float32; `pointers` one entry per such row. */
void NAME(few_rows)(const T *x, int64_t x_stride, T *y, int64_t y_stride, int64_t width, const Span *spans,
                    int64_t num_spans, const int64_t *order, const Layer *const *slots, float *scratch,
                    void **pointers) {
    T **y_rows = (T **)pointers;
    int64_t num_rows = 0, bytes = 0;
    for (int64_t s = 0; s < num_spans; s++) {
        const Layer *layer = slots[spans[s].slot];
        int64_t rows = spans[s].stop - spans[s].start;
        if (!layer) continue;
        for (int64_t r = 0; r < rows; r++) {
            int64_t row = order ? order[spans[s].start + r] : spans[s].start + r;
            y_rows[num_rows + r] = y + row * y_stride;
            float *to = scratch + (num_rows + r) * width;
            const T *from = x + row * x_stride;
            int64_t c = 0;
            for (; c + LANES <= width; c += LANES) store_float(to + c, NAME(load)(from + c));
            for (; c < width; c++) to[c] = NAME(one)(from + c);
        }
        bytes += layer->ranks * width * (int64_t)sizeof(T) * ((rows + BLOCK - 1) / BLOCK);
        num_rows += rows;
    }
    float *hidden = scratch + num_rows * width;
#pragma omp parallel if (bytes > PARALLEL_BYTES)
    {
        int64_t first = 0, offset = 0, turn = 0, me = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t s = 0; s < num_spans; s++) {
            const Layer *layer = slots[spans[s].slot];
            int64_t rows = spans[s].stop - spans[s].start;
            if (!layer) continue;
            int64_t items = (layer->ranks + RANKS_PER_ITEM - 1) / RANKS_PER_ITEM;
            for (int64_t item = 0; item < items; item++, turn++)
                if (turn % all == me) NAME(shrink)(layer->a, width, item * RANKS_PER_ITEM,
                             least((item + 1) * RANKS_PER_ITEM, layer->ranks), scratch + first * width, rows,
                             hidden + offset, layer->ranks);
            first += rows;
            offset += rows * layer->ranks;
        }
#pragma omp barrier
        first = offset = 0;
        for (int64_t s = 0; s < num_spans; s++) {
            const Layer *layer = slots[spans[s].slot];
            int64_t rows = spans[s].stop - spans[s].start;
            if (!layer) continue;
            for (int64_t i = 0; i < layer->num_slices; i++) {
                const Slice *slice = &layer->slices[i];
                int64_t columns = slice->right - slice->left;
                int64_t items = (columns + COLUMNS_PER_ITEM - 1) / COLUMNS_PER_ITEM;
                for (int64_t item = 0; item < items; item++, turn++)
                    if (turn % all == me) NAME(expand)(slice, item * COLUMNS_PER_ITEM, least((item + 1) * COLUMNS_PER_ITEM, columns),
                                 hidden + offset, layer->ranks, rows, y_rows + first);
            }
            first += rows;
            offset += rows * layer->ranks;
        }
    }
}
