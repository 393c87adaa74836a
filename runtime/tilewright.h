/* Tilewright's runtime: loads compiled transformer encoders and runs them.
 *
 *     tilewright_engine *engine;
 *     if (tilewright_open("model.tw", NULL, &engine) != TILEWRIGHT_OK) { puts(tilewright_error()); return 1; }
 *     tilewright_text text = {"A man is eating.", 16};
 *     int64_t ids[512];
 *     size_t tokens;
 *     float embedding[384], *outputs[] = {NULL, embedding};
 *     if (tilewright_tokenize(engine, &text, 1, 1, ids, NULL, 512, &tokens) != TILEWRIGHT_OK ||
 *         tilewright_run(engine, ids, NULL, NULL, 1, tokens, outputs) != TILEWRIGHT_OK) puts(tilewright_error());
 *     tilewright_close(engine);
 *
 * Every function that can fail returns a status, and leaves a line of text for `tilewright_error`. Bad input of any kind
 * is a status, never an abort; a call that fails leaves the engine as it was.
 *
 * Threads: any number of engines may live in a process and run at the same time; each has threads of its own. Calls of one
 * engine from several threads are safe and run one after the other. Different engines share nothing but the pages of files.
 *
 * Forking: a process may fork while none of its threads is inside a function of this library; engines go on in the child,
 * which starts threads of its own at its first call.
 *
 * Files: the weights are mapped, so a file that is truncated in place while an engine is open ends the process with SIGBUS.
 * Replace an artifact as `tilewright compile` does, by another directory.
 *
 * Linux on x86-64, glibc 2.17 or later or musl. Needs -pthread, and -ldl before glibc 2.34.
 */
#ifndef TILEWRIGHT_H
#define TILEWRIGHT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef TILEWRIGHT_API
#define TILEWRIGHT_API __attribute__((visibility("default")))
#endif

typedef enum {
    TILEWRIGHT_OK = 0,
    TILEWRIGHT_INVALID_INPUT = 1,    /* an argument: ids, lengths, options */
    TILEWRIGHT_INVALID_ARTIFACT = 2, /* files missing, damaged, altered, or of another version */
    TILEWRIGHT_TARGET_MISMATCH = 3,  /* code for another CPU */
    TILEWRIGHT_OUT_OF_MEMORY = 4     /* or no more threads */
} tilewright_status;

typedef struct tilewright_engine tilewright_engine;

/* Flags of tilewright_options. */
enum {
    /* Do not compute the sha256 of files: for artifacts that something else verified, such as a signed container image.
     * Everything else is checked. */
    TILEWRIGHT_TRUST_FILES = 1,
    /* Do not look at the CPU's features; for kernels that run elsewhere than on this CPU, such as in an emulator. */
    TILEWRIGHT_ANY_CPU = 2
};

/* What an engine is to be like; zeros, or NULL instead of the whole, are the defaults. */
typedef struct {
    /* 0: as many as there are cores that this process may use (its affinity mask), otherwise 1 to 1024. The calling thread
     * is one of them. */
    int32_t threads;
    uint32_t flags;
    /* ISA level, such as "avx512vnni". NULL: what the environment variable TILEWRIGHT_ISA names, else the best that the
     * artifact holds and the CPU runs. */
    const char *level;
    /* NULL: threads run where the system puts them. Else `threads` numbers of cores: thread i is bound to cores[i], except
     * thread 0, which is whoever calls. */
    const int32_t *cores;
    /* How long a thread without work asks for it, yielding its core each time, before it sleeps, in microseconds; 0: 3000,
     * longer than a call's serial stretches; negative: it sleeps at once. */
    int32_t spin_us;
} tilewright_options;

typedef struct {
    const char *name;
    int64_t width;    /* values per token or per sequence */
    int32_t per_token; /* 1: f32[batch, seq, width]; 0: f32[batch, width] */
    int32_t squeeze;  /* 1: width is 1, and users expect the axis to be absent */
} tilewright_output;

/* What a model takes and gives. All pointers live as long as the engine. */
typedef struct {
    const char *level;          /* the ISA level that runs */
    int32_t threads;
    int32_t takes_token_types;  /* whether token_type_ids may be given */
    int64_t vocab_size;         /* ids are 0 .. vocab_size - 1 */
    int64_t token_types;        /* token types are 0 .. token_types - 1 */
    int64_t max_positions;      /* the most tokens of a sequence */
    int64_t max_tokens;         /* tokens of one run of the kernels; larger batches are split */
    size_t outputs;
    const tilewright_output *output; /* [outputs] */
} tilewright_info;

/* Open the artifact directory `path` (UTF-8 or any bytes that name a file). All files are checked against the sha256 that
 * the manifest lists at every open: hashing takes 0.5 to 1 ms per MB with SHA instructions, and what a stamp of an earlier
 * check would say could have been copied along with a damaged file. On success *engine is to be closed. */
TILEWRIGHT_API tilewright_status tilewright_open(const char *path, const tilewright_options *options,
                                                 tilewright_engine **engine);

/* Give back all that an engine holds. NULL is ignored. No call may be under way. */
TILEWRIGHT_API void tilewright_close(tilewright_engine *engine);

TILEWRIGHT_API const tilewright_info *tilewright_describe(const tilewright_engine *engine);

/* Run a padded batch: input_ids i64[batch, seq]; attention_mask and token_type_ids of the same shape, or NULL.
 *
 * The mask holds 1 for tokens and 0 for padding, anywhere in a row; what stands at padding is not looked at. Without a mask
 * all are tokens, without types all are of type 0. A sequence's results depend neither on the other sequences nor on where
 * its padding is. outputs[i] is where output i of `tilewright_info` goes, f32[batch, seq, width] (zero at padding) or
 * f32[batch, width], or NULL if it is not wanted. */
TILEWRIGHT_API tilewright_status tilewright_run(tilewright_engine *engine, const int64_t *input_ids,
                                                const int64_t *attention_mask, const int64_t *token_type_ids, size_t batch,
                                                size_t seq, float *const *outputs);

/* Run sequences without padding: sequence b is input_ids[offsets[b]] to input_ids[offsets[b + 1] - 1], of at least one token,
 * and offsets[0] is 0. Outputs per token are f32[offsets[batch], width]. */
TILEWRIGHT_API tilewright_status tilewright_run_ragged(tilewright_engine *engine, const int64_t *input_ids,
                                                       const int64_t *token_type_ids, const int64_t *offsets, size_t batch,
                                                       float *const *outputs);

/* UTF-8 of `size` bytes, which need no NUL behind them and may hold some. What is no UTF-8 counts as U+FFFD. */
typedef struct {
    const char *bytes;
    size_t size;
} tilewright_text;

/* Turn a text, or two that belong together such as a question and its context, into token ids with the model's special tokens.
 *
 * count: of texts, 1 or 2. truncate: 1 to cut the tokens to max_positions, the end of the longer text first; 0 to keep all.
 * input_ids, token_type_ids: where the tokens go, room for `capacity` each; the types may be NULL. *tokens says how many
 * there are, also where the call fails because `capacity` is less. Any number of threads may tokenize at the same time.
 * Works for models that came with BERT's WordPiece tokenizer; for others use a library of your own and give ids. */
TILEWRIGHT_API tilewright_status tilewright_tokenize(const tilewright_engine *engine, const tilewright_text *texts,
                                                     size_t count, int32_t truncate, int64_t *input_ids,
                                                     int64_t *token_type_ids, size_t capacity, size_t *tokens);

/* Called after each kernel, in the thread that called tilewright_run. */
typedef void (*tilewright_observer)(void *context, const char *kernel, uint64_t nanoseconds);

/* Time kernels from now on; an observer of NULL ends it. */
TILEWRIGHT_API void tilewright_observe(tilewright_engine *engine, tilewright_observer observer, void *context);

/* The text of the last failure in this thread: one line that says what was asked, what was found, what would work. */
TILEWRIGHT_API const char *tilewright_error(void);

/* A model that is not in a directory, such as one linked into a program. */
typedef struct {
    const char *manifest; /* the text of manifest.json */
    size_t manifest_size;
    const void *weights; /* the bytes of weights.safetensors, at a multiple of 64 */
    size_t weights_size;
    /* Address of `symbol` of the library of ISA level `level`, or NULL: its kernels and variables by their names in the
     * object file, as dlsym would find them. */
    void *(*symbol)(void *context, const char *level, const char *symbol);
    void *context;
    const void *wordpiece; /* the bytes of wordpiece.bin, at a multiple of 4; NULL if there is none */
    size_t wordpiece_size;
} tilewright_model;

/* Open a model in memory, which must outlive the engine; `symbol` is called only in here. Nothing is hashed. */
TILEWRIGHT_API tilewright_status tilewright_open_model(const tilewright_model *model, const tilewright_options *options,
                                                       tilewright_engine **engine);

#ifdef __cplusplus
}
#endif
#endif
