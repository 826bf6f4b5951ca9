"""The kernels' bodies: C++ that Metal and CUDA both read (see `dialects.py`).

T is the type that the model computes in. Sums, angles and softmax are float32, and intermediate results are rounded to
T where MLX's own operations, one after the other, would write them to memory.
"""

# One team per head of a token. qkv (B * L, H + 2K, D); sizes: H, K, L, and 1 if each row has a position of its own.
# `rotation`: the base-2 logarithm of RoPE's base, and the norm's epsilon.
_NORMALIZE_AND_ROTATE = """
    const int heads = sizes[0], kv_heads = sizes[1], length = sizes[2];
    const int all = heads + 2 * kv_heads;
    const int head = group % all, row = group / all / length, place = group / all % length;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const int half_width = D / 2;
    auto x = qkv + group * D;
    GROUP_SHARED float turned[D];

    float squares = 0;
    for (int i = lane; i < D; i += 32) squares += float(x[i]) * float(x[i]);
    const float factor = inverse_root(lane_sum(squares) / D + rotation[1]);
    const float position = float(positions[row * sizes[3]] + place);
    auto weight = is_query ? query_norm : key_norm;
    for (int i = lane; i < half_width; i += 32) {
        float first = float(x[i]), second = float(x[i + half_width]);
        if (!is_value) {
            if (NORMALIZED) {
                first = float(T(float(weight[i]) * float(T(first * factor))));
                second = float(T(float(weight[i + half_width]) * float(T(second * factor))));
            }
            const float angle = position * two_to(-rotation[0] * (float(i) / half_width));
            const float c = cosine(angle), s = sine(angle);
            const float before = first;
            first = before * c - second * s;
            second = before * s + second * c;
        }
        turned[i] = float(T(first));
        turned[i + half_width] = float(T(second));
    }
    TEAM_BARRIER();
"""

NORMALIZE_AND_ROTATE = (
    _NORMALIZE_AND_ROTATE
    + """
    const int count = is_query ? heads : kv_heads;
    const int number = is_query ? head : is_value ? head - heads - kv_heads : head - heads;
    auto out = is_query ? queries : is_value ? values : keys;
    for (int i = lane; i < D; i += 32) out[((row * count + number) * length + place) * D + i] = T(turned[i]);
"""
)

# Keys and values become words, scales and biases as `mx.quantize` makes them: the end of a group's range that is
# farther from 0 is a multiple of the scale, so that 0 is exact.
NORMALIZE_ROTATE_AND_QUANTIZE = (
    _NORMALIZE_AND_ROTATE
    + """
    if (is_query) {
        for (int i = lane; i < D; i += 32) queries[((row * heads + head) * length + place) * D + i] = T(turned[i]);
        return;
    }
    const int number = is_value ? head - heads - kv_heads : head - heads;
    const int token = (row * kv_heads + number) * length + place;
    auto words = is_value ? value_words : key_words;
    auto scales = is_value ? value_scales : key_scales;
    auto biases = is_value ? value_biases : key_biases;
    const int in_word = 32 / BITS, largest = (1 << BITS) - 1;
    for (int word = lane; word < D / in_word; word += 32) {
        const int start = word * in_word, share = start / GROUP;
        float low = turned[share * GROUP], high = low;
        for (int i = share * GROUP; i < (share + 1) * GROUP; i++) {
            low = turned[i] < low ? turned[i] : low;
            high = turned[i] > high ? turned[i] : high;
        }
        const bool from_low = (low < 0 ? -low : low) > (high < 0 ? -high : high);
        float scale = (high - low) / largest;
        scale = scale > 1e-7f ? scale : 1e-7f;
        scale = from_low ? scale : -scale;
        const float edge = from_low ? low : high;
        const float steps = nearest(edge / scale);
        scale = steps != 0 ? edge / steps : scale;
        const float bias = steps != 0 ? edge : 0;
        unsigned int packed = 0;
        for (int i = 0; i < in_word; i++) {
            float value = nearest((turned[start + i] - bias) / scale);
            value = value < 0 ? 0 : value > largest ? largest : value;
            packed |= (unsigned int)(value) << (BITS * i);
        }
        words[token * (D / in_word) + word] = packed;
        if (start % GROUP == 0) {
            scales[token * (D / GROUP) + share] = T(scale);
            biases[token * (D / GROUP) + share] = T(bias);
        }
    }
"""
)

# One group per row. x, update (R, M).
ADD_AND_NORMALIZE = """
    GROUP_SHARED float partial[THREADS / 32];
    auto total = sum + group * M;
    float squares = 0;
    for (int i = member; i < M; i += THREADS) {
        const T added = T(float(x[group * M + i]) + float(update[group * M + i]));
        total[i] = added;
        squares += float(added) * float(added);
    }
    squares = lane_sum(squares);
    if (lane == 0) partial[team] = squares;
    GROUP_BARRIER();
    squares = 0;
    for (int i = 0; i < THREADS / 32; i++) squares += partial[i];
    const float factor = inverse_root(squares / M + epsilon[0]);
    for (int i = member; i < M; i += THREADS)
        normed[group * M + i] = T(float(weight[i]) * float(T(float(total[i]) * factor)));
"""

# One group per query head of a row; its teams take turns over the tokens, and each keeps a running softmax (Milakov and
# Gimelshein, arXiv:1805.02867). queries (B, H, 1, D); words, scales and biases (B, K, S, ...); sizes: H, K, S, and 1 if
# each row has a first slot of its own; a row sees its slots from `first` to `last`.
ATTEND_QUANTIZED = """
    const int heads = sizes[0], kv_heads = sizes[1], slots = sizes[2];
    const int row = group / heads, kv_head = group % heads / (heads / kv_heads);
    const int begin = sizes[3] ? first[row] : 0, end = last[0] + 1;
    const int each = D / 32, in_word = 32 / BITS, shares = D / GROUP;
    GROUP_SHARED float highest[TEAMS];
    GROUP_SHARED float sums[TEAMS];
    GROUP_SHARED float parts[TEAMS * D];

    float query[D / 32], found[D / 32];
    for (int e = 0; e < each; e++) {
        query[e] = float(queries[group * D + lane * each + e]) * scale[0];
        found[e] = 0;
    }
    float best = -1e38f, sum = 0;
    for (int slot = begin + team; slot < end; slot += TEAMS) {
        const int token = (row * kv_heads + kv_head) * slots + slot;
        float product = 0;
        for (int e = 0; e < each; e++) {
            const int i = lane * each + e, share = token * shares + i / GROUP;
            const unsigned int code = key_words[token * (D / in_word) + i / in_word] >> (i % in_word * BITS);
            const float key = float(key_scales[share]) * float(code & ((1u << BITS) - 1)) + float(key_biases[share]);
            product += query[e] * key;
        }
        product = lane_sum(product);
        const float higher = product > best ? product : best;
        const float fade = e_to(best - higher), weight = e_to(product - higher);
        sum = sum * fade + weight;
        for (int e = 0; e < each; e++) {
            const int i = lane * each + e, share = token * shares + i / GROUP;
            const unsigned int code = value_words[token * (D / in_word) + i / in_word] >> (i % in_word * BITS);
            const float value =
                float(value_scales[share]) * float(code & ((1u << BITS) - 1)) + float(value_biases[share]);
            found[e] = found[e] * fade + weight * value;
        }
        best = higher;
    }
    if (lane == 0) {
        highest[team] = best;
        sums[team] = sum;
    }
    for (int e = 0; e < each; e++) parts[team * D + lane * each + e] = found[e];
    GROUP_BARRIER();
    best = highest[0];
    for (int t = 1; t < TEAMS; t++) best = highest[t] > best ? highest[t] : best;
    sum = 0;
    for (int t = 0; t < TEAMS; t++) sum += sums[t] * e_to(highest[t] - best);
    for (int i = member; i < D; i += TEAMS * 32) {
        float total = 0;
        for (int t = 0; t < TEAMS; t++) total += parts[t * D + i] * e_to(highest[t] - best);
        read[group * D + i] = T(total / sum);
    }
"""
