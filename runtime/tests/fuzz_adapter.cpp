// libFuzzer target: any bytes as the adapter of a good model are an irq::Error, or a model that computes.
// IRQ_MODELS: formats/vectors/models.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "irq/engine.h"
#include "irq/error.h"
#include "memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const MemoryFile file(data, size);
    for (const char *base : {IRQ_MODELS "/irq.gguf", IRQ_MODELS "/stock.gguf", IRQ_MODELS "/pair-base.gguf"}) {
        irq::EngineOptions options;
        options.adapter = file.path();
        options.threads = 1;
        options.context = 4;
        options.mode = size % 2 == 0 ? irq::Mode::exact : irq::Mode::fast;
        try {
            irq::Engine engine(base, options);
            const auto sequence = engine.new_sequence();
            std::vector<float> logits(static_cast<std::size_t>(engine.model().config().vocab_size));
            const irq::Row row{sequence.get(), 1, true};
            engine.eval(&row, 1, logits.data());
        } catch (const irq::Error &) {
        }
    }
    return 0;
}
