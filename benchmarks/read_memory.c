/* Reads an array with all threads, as fast as plain C does: the reference of benchmarks/bandwidth.py. */
#include <pthread.h>
#include <stddef.h>

enum { LANES = 32, MOST_THREADS = 256 };

struct part {
    const float *start;
    size_t count, repeats;
    float sum;
};

static void *read_part(void *argument) {
    struct part *part = argument;
    float sum = 0;
    for (size_t repeat = 0; repeat < part->repeats; repeat++) {
        float lanes[LANES] = {0};
        for (size_t at = 0; at + LANES <= part->count; at += LANES)
            for (int lane = 0; lane < LANES; lane++)
                lanes[lane] += part->start[at + lane];
        for (int lane = 0; lane < LANES; lane++)
            sum += lanes[lane];
        __asm__ volatile("" ::: "memory"); /* or the compiler would read once for all repeats */
    }
    part->sum = sum;
    return NULL;
}

/* The sum of an array that is read `repeats` times, each thread its own part; also so that nothing is left out. */
float read_memory(const float *start, size_t count, size_t num_threads, size_t repeats) {
    pthread_t threads[MOST_THREADS];
    struct part parts[MOST_THREADS];
    size_t share = count / num_threads;
    float sum = 0;
    for (size_t i = 0; i < num_threads; i++) {
        parts[i] = (struct part){start + i * share, share, repeats, 0};
        pthread_create(&threads[i], NULL, read_part, &parts[i]);
    }
    for (size_t i = 0; i < num_threads; i++) {
        pthread_join(threads[i], NULL);
        sum += parts[i].sum;
    }
    return sum;
}
