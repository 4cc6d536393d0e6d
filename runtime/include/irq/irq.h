/* C interface of the irq runtime: open a GGUF model, append tokens to a sequence, read logits.
 *
 * Text and tokens are the caller's business. Every function that can fail returns an irq_status and
 * leaves a message for irq_last_error(); outputs are untouched then. Nothing throws, aborts or prints.
 *
 * Threads: one call at a time per engine and its sequences; different engines are independent. An engine
 * owns worker threads and does not survive fork(). The model file is mapped: to cut it short while an
 * engine computes is to cut a running program short (SIGBUS); to change it between two calls is an error
 * of the next one. See runtime/examples/generate.c. */
#ifndef IRQ_H
#define IRQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define IRQ_API __attribute__((visibility("default")))
#else
#define IRQ_API
#endif

typedef enum irq_status {
    IRQ_OK = 0,
    IRQ_INTERNAL = 1,    /* a bug, or no memory */
    IRQ_USAGE = 2,       /* an argument is out of range, a file does not exist, a sequence is full */
    IRQ_MALFORMED = 3,   /* a file breaks its specification, or changed on disk */
    IRQ_UNSUPPORTED = 4, /* a file is well formed, but this version cannot run it */
    IRQ_WRONG_BASE = 5   /* the adapter was trained against another quantised base, or is of another pair */
} irq_status;

typedef enum irq_mode {
    IRQ_EXACT = 0, /* float32 weights, inputs and sums: the model that was trained */
    IRQ_FAST = 1   /* block-quantised matrices in integers: inputs rounded to 12 bits, or where the processor
                      multiplies bytes to 8 (up to eight tokens at once: twice 8) */
} irq_mode;

typedef struct irq_options {
    const char *adapter;  /* adapter file, or NULL: what the model embeds. A base.gguf whose offsets lie in
                             its adapter.gguf is refused without it */
    double adapter_scale; /* 1: as trained; without an adapter nothing else is taken */
    uint32_t threads;     /* 1 to 256 */
    irq_mode mode;
    size_t context;       /* positions a sequence may hold, no more than the model was trained on; 0: as
                             many as those, but 4096 at most */
    int half_cache;       /* keys and values in fp16 instead of float32 */
} irq_options;

typedef struct irq_info {
    uint32_t layers, hidden_size, heads, key_value_heads, head_dim, vocabulary;
    size_t context;           /* of a new sequence */
    uint64_t file_bytes;      /* of the model, all shards */
    uint64_t bytes_per_token; /* of weights and adapters read to decode one token */
    uint64_t sequence_bytes;  /* of keys and values of one full sequence */
} irq_info;

typedef struct irq_engine irq_engine;
typedef struct irq_sequence irq_sequence;

/* adapter none, scale 1, 2 threads, exact, context 0, float32 cache. */
IRQ_API irq_options irq_default_options(void);

/* Opens a model; options may be NULL. Close with irq_close. */
IRQ_API irq_status irq_open(const char *path, const irq_options *options, irq_engine **engine);
/* Closes an engine (or NULL), after all its sequences. */
IRQ_API void irq_close(irq_engine *engine);
IRQ_API irq_info irq_model_info(const irq_engine *engine);

/* An empty sequence, for this engine alone: another one refuses it. Free with irq_sequence_free. */
IRQ_API irq_status irq_sequence_new(irq_engine *engine, irq_sequence **sequence);
IRQ_API void irq_sequence_free(irq_sequence *sequence);
/* Tokens it holds. */
IRQ_API size_t irq_sequence_length(const irq_sequence *sequence);
/* Forgets all tokens from `length` on; 0 empties it. */
IRQ_API void irq_sequence_truncate(irq_sequence *sequence, size_t length);

/* Appends tokens[count], count >= 1, and writes the logits after the last one, float[vocabulary].
 * logits may be NULL. */
IRQ_API irq_status irq_eval(irq_engine *engine, irq_sequence *sequence, const int32_t *tokens, size_t count,
                            float *logits);
/* The same with the logits after every token, float[count * vocabulary]. */
IRQ_API irq_status irq_eval_all(irq_engine *engine, irq_sequence *sequence, const int32_t *tokens, size_t count,
                                float *logits);
/* One token for each of `count` different sequences; float[count * vocabulary]. Reads the weights once. */
IRQ_API irq_status irq_eval_each(irq_engine *engine, irq_sequence *const *sequences, const int32_t *tokens,
                                 size_t count, float *logits);

/* Index of the largest value, of equal ones the first: the greedy choice. */
IRQ_API int32_t irq_argmax(const float *logits, size_t count);

/* What the last failed call of this thread has to say; never NULL, valid until the next failure. */
IRQ_API const char *irq_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* IRQ_H */
