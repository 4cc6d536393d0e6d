// libFuzzer target: any bytes as a model file are an irq::Error, or a model that computes.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "irq/engine.h"
#include "irq/error.h"
#include "memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const MemoryFile file(data, size);
    irq::EngineOptions options;
    options.threads = 1;
    options.context = 6;
    options.mode = size % 2 == 0 ? irq::Mode::exact : irq::Mode::fast;
    options.half_cache = size % 3 == 0;
    try {
        irq::Engine engine(file.path(), options);
        const auto sequence = engine.new_sequence();
        std::vector<float> logits(static_cast<std::size_t>(engine.model().config().vocab_size));
        const irq::Row prompt[3] = {{sequence.get(), 0, false}, {sequence.get(), 0, false}, {sequence.get(), 0, true}};
        engine.eval(prompt, 3, logits.data());
        engine.eval(prompt, 1, logits.data());
    } catch (const irq::Error &) {
    }
    return 0;
}
