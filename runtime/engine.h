/* Opening an engine in two steps, between which whoever opens it finds the weights and the code of the level chosen. */
#ifndef TW_ENGINE_H
#define TW_ENGINE_H

#include "manifest.h"
#include "wordpiece.h"

/* Read a manifest and choose the level to run. */
tilewright_status tw_engine_begin(const char *manifest, size_t size, const tilewright_options *options,
                                  tilewright_engine **engine);

const tw_manifest *tw_engine_manifest(const tilewright_engine *engine);
const tw_level *tw_engine_level(const tilewright_engine *engine);

/* The table of the model's tokenizer, NULL if it has none. */
const tw_wordpiece *tw_engine_wordpiece(const tilewright_engine *engine);

/* What tilewright_close is to call last; set before anything else can fail. */
void tw_engine_on_close(tilewright_engine *engine, void (*release)(void *resources), void *resources);

/* Bind weights and code, as tilewright_model has them, and start the threads. */
tilewright_status tw_engine_finish(tilewright_engine *engine, const tilewright_model *model);

#endif
