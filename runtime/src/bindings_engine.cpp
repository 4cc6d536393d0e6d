// irq_runtime._native.Engine and Sequence: the engine under Python's exceptions and without its lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "irq/bandwidth.h"
#include "irq/engine.h"
#include "irq/error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Tokens = std::vector<std::int32_t>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

// Raises the class of irq_formats.errors that belongs to the fault.
void raise_in_python(const irq::Error &error) {
    static const char *const names[] = {"IrqError", "UsageError", "MalformedFile", "UnsupportedModel", "WrongBase"};
    const auto text = [](const std::string &value) -> nb::object {
        if (value.empty()) return nb::none();
        return nb::steal(PyUnicode_DecodeUTF8(value.data(), static_cast<Py_ssize_t>(value.size()), "replace"));
    };
    const nb::object type = nb::module_::import_("irq_formats.errors").attr(names[static_cast<int>(error.fault)]);
    const nb::object made = type(text(error.message), "where"_a = text(error.where), "expected"_a = text(error.expected),
                                 "got"_a = text(error.got), "hint"_a = text(error.hint));
    PyErr_SetObject(type.ptr(), made.ptr());
}

// An engine and the lock that lets any Python thread use it.
class SharedEngine {
public:
    SharedEngine(const std::string &path, const irq::EngineOptions &options) : engine_(path, options) {}

    std::size_t vocabulary() const { return static_cast<std::size_t>(engine_.model().config().vocab_size); }
    const irq::Engine &engine() const { return engine_; }

    Matrix eval(const std::vector<irq::Row> &rows, std::size_t wanted) {
        auto logits = std::make_unique<float[]>(wanted * vocabulary());
        {
            nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> alone(mutex_);
            engine_.eval(rows.data(), rows.size(), logits.get());
        }
        float *raw = logits.release();
        return Matrix(raw, {wanted, vocabulary()},
                      nb::capsule(raw, [](void *p) noexcept { delete[] static_cast<float *>(p); }));
    }

private:
    irq::Engine engine_;
    std::mutex mutex_;
};

std::unique_ptr<SharedEngine> open_engine(const std::string &path, const std::string &adapter, double adapter_scale,
                                          unsigned threads, bool fast, std::size_t context, bool half_cache) {
    nb::gil_scoped_release unlocked;
    const irq::EngineOptions options{adapter, adapter_scale, threads, fast ? irq::Mode::fast : irq::Mode::exact,
                                     context, half_cache};
    return std::make_unique<SharedEngine>(path, options);
}

// Appends tokens to one sequence; logits after every token, or after the last.
Matrix step(SharedEngine &engine, irq::Sequence &sequence, const Tokens &tokens, bool last_only) {
    std::vector<irq::Row> rows;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        rows.push_back({&sequence, tokens[i], !last_only || i + 1 == tokens.size()});
    }
    return engine.eval(rows, last_only ? 1 : tokens.size());
}

// Appends one token to each of several sequences.
Matrix step_each(SharedEngine &engine, const std::vector<irq::Sequence *> &sequences, const Tokens &tokens) {
    std::vector<irq::Row> rows;
    for (std::size_t i = 0; i < tokens.size(); ++i) rows.push_back({sequences.at(i), tokens[i], true});
    return engine.eval(rows, rows.size());
}

nb::dict info(const SharedEngine &engine) {
    const irq::Model &model = engine.engine().model();
    nb::dict values;
    values["vocab_size"] = engine.vocabulary();
    values["context"] = engine.engine().options().context;
    values["file_bytes"] = model.file_bytes();
    values["bytes_per_token"] = model.bytes_per_token();
    values["sequence_bytes"] = engine.engine().sequence_bytes();
    values["isa"] = irq::isa_name(irq::active_isa());
    return values;
}

std::vector<std::string> check_gguf(const std::string &path, bool is_model) {
    const irq::GgufFile gguf(path);
    if (is_model) irq::read_model(gguf);
    std::vector<std::string> names;
    for (const auto &[name, tensor] : gguf.tensors()) names.push_back(name);
    return names;
}

double read_bandwidth(unsigned threads, std::size_t size, int passes) {
    if (threads < 1 || threads > 256) throw irq::Error(irq::Fault::usage, "threads out of range", "", "1 to 256");
    nb::gil_scoped_release unlocked;
    irq::ThreadPool pool(threads);
    return irq::read_bandwidth(pool, size, passes);
}

}  // namespace

void bind_engine(nb::module_ &module);
void bind_engine(nb::module_ &module) {
    nb::register_exception_translator(
        [](const std::exception_ptr &pointer, void *) {
            try {
                std::rethrow_exception(pointer);
            } catch (const irq::Error &error) {
                raise_in_python(error);
            }
        },
        nullptr);

    nb::class_<irq::Sequence>(module, "Sequence", "Keys and values of one text.")
        .def_prop_ro("length", &irq::Sequence::length, "Tokens held.")
        .def_prop_ro("capacity", &irq::Sequence::capacity, "Tokens it can hold.")
        .def("truncate", &irq::Sequence::truncate, "length"_a, "Forget all tokens from `length` on.");

    nb::class_<SharedEngine>(module, "Engine", "A model ready to run; see irq_runtime.engine.")
        .def(nb::new_(&open_engine), "path"_a, "adapter"_a, "adapter_scale"_a, "threads"_a, "fast"_a, "context"_a,
             "half_cache"_a)
        .def("info", &info, "Sizes, and the instruction set in use.")
        .def("new_sequence", [](const SharedEngine &engine) { return engine.engine().new_sequence(); },
             nb::keep_alive<0, 1>(), "An empty sequence.")
        .def("step", &step, "sequence"_a, "tokens"_a, "last_only"_a,
             "Append tokens; logits float32 (n, vocab_size), or (1, vocab_size) of the last.")
        .def("step_each", &step_each, "sequences"_a, "tokens"_a,
             "Append one token to each of several sequences; logits float32 (n, vocab_size).");

    module.def("read_bandwidth", &read_bandwidth, "threads"_a, "size"_a, "passes"_a,
               "Bytes per second that `threads` read from a buffer of `size` bytes, best of `passes`.");
    module.def("check_gguf", &check_gguf, "path"_a, "is_model"_a = false,
               "Check a GGUF file as the engine's loader does, and with is_model its model description; "
               "return the names of its tensors, sorted.");
}
