"""The lengths of Azure's conversation trace as a table of quantiles.

Derived by this project from AzureLLMInferenceTrace_conv of 2023, published by Microsoft in
Azure/AzurePublicDataset under CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0) and described in
"Splitwise" (ISCA 2024). It holds figures about its 19,366 requests and no row of it: the requests are
divided by prompt length into bands; of each band there are the number of requests, and the quantiles of
the prompt and of the output lengths. What is drawn from it is within 0.02 of the trace's distributions
of prompts and of outputs (Kolmogorov-Smirnov distance).
"""

AZURE_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""The levels of the quantiles."""

AZURE_BANDS = (
    (
        1277,
        (2, 7, 12, 21, 44, 91, 126, 167, 181, 181, 181, 189, 194, 195, 195),
        (11, 12, 12, 24, 89, 110, 124, 140, 158, 173, 192, 217, 230, 332, 1000),
    ),
    (
        1345,
        (196, 197, 197, 200, 200, 203, 206, 209, 210, 215, 225, 238, 245, 279, 300),
        (14, 14, 14, 55, 78, 101, 138, 162, 167, 181, 194, 217, 217, 217, 258),
    ),
    (
        2819,
        (302, 308, 329, 372, 376, 380, 385, 389, 392, 395, 396, 398, 400, 400, 400),
        (7, 18, 18, 53, 66, 75, 82, 88, 92, 97, 104, 118, 133, 164, 436),
    ),
    (
        2266,
        (401, 401, 401, 402, 404, 406, 408, 411, 415, 420, 428, 443, 463, 618, 650),
        (25, 54, 77, 82, 88, 91, 95, 99, 103, 109, 121, 140, 153, 200, 739),
    ),
    (
        2131,
        (653, 684, 766, 852, 903, 949, 975, 986, 997, 1005, 1012, 1019, 1021, 1024, 1024),
        (10, 36, 57, 82, 105, 373, 390, 396, 401, 412, 424, 448, 514, 609, 921),
    ),
    (
        4163,
        (1025, 1025, 1030, 1036, 1046, 1056, 1067, 1079, 1090, 1101, 1116, 1131, 1140, 1148, 1150),
        (28, 56, 363, 377, 390, 396, 398, 407, 414, 423, 434, 491, 556, 667, 1000),
    ),
    (
        2380,
        (1151, 1152, 1159, 1165, 1184, 1214, 1262, 1313, 1315, 1320, 1381, 1573, 1680, 1784, 1799),
        (24, 39, 50, 63, 88, 123, 155, 188, 250, 396, 407, 429, 482, 612, 992),
    ),
    (
        2985,
        (1801, 1834, 1950, 2059, 2341, 2584, 3089, 4075, 4079, 4084, 4089, 4108, 4164, 5936, 14050),
        (15, 27, 32, 37, 44, 50, 59, 69, 80, 94, 111, 137, 158, 233, 757),
    ),
)
"""Requests, quantiles of the prompt tokens and quantiles of the output tokens of each band."""
