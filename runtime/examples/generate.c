/* Greedy continuation of token ids: generate MODEL COUNT TOKEN... */
#include <stdio.h>
#include <stdlib.h>

#include "irq/irq.h"

static int fail(void) {
    fprintf(stderr, "error: %s\n", irq_last_error());
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL COUNT TOKEN...\n", argv[0]);
        return 2;
    }
    irq_options options = irq_default_options();
    options.mode = getenv("IRQ_FAST") ? IRQ_FAST : IRQ_EXACT;
    irq_engine *engine;
    irq_sequence *sequence;
    if (irq_open(argv[1], &options, &engine) != IRQ_OK) return fail();
    if (irq_sequence_new(engine, &sequence) != IRQ_OK) return fail();

    size_t vocabulary = irq_model_info(engine).vocabulary, count = (size_t)argc - 3;
    int32_t *tokens = malloc(count * sizeof *tokens);
    float *logits = malloc(vocabulary * sizeof *logits);
    for (size_t i = 0; i < count; ++i) tokens[i] = (int32_t)atoi(argv[i + 3]);

    for (int left = atoi(argv[2]); left > 0; --left) {
        if (irq_eval(engine, sequence, tokens, count, logits) != IRQ_OK) return fail();
        tokens[0] = irq_argmax(logits, vocabulary);
        count = 1;
        printf("%d\n", tokens[0]);
    }
    free(logits);
    free(tokens);
    irq_sequence_free(sequence);
    irq_close(engine);
    return 0;
}
