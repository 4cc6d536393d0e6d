#include "irq/gguf.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdio>

#include "irq/error.h"

namespace irq {
namespace {

std::uint64_t padding(std::uint64_t nbytes, std::uint64_t alignment) { return (~nbytes + 1) & (alignment - 1); }

void check_padding(const File &file, std::uint64_t begin, std::uint64_t end) {
    end = std::min(end, file.size());
    if (begin >= end) return;
    std::vector<std::uint8_t> bytes(end - begin);  // less than an alignment
    file.read(begin, bytes.data(), bytes.size());
    if (std::any_of(bytes.begin(), bytes.end(), [](std::uint8_t byte) { return byte != 0; })) {
        throw Error(Fault::malformed, "padding is not zero", file.path(), "",
                    "bytes " + show(begin) + " to " + show(end));
    }
}

// Checks that tensors fill the data section exactly, in order, and gives them absolute offsets.
std::vector<TensorInfo> place(const File &file, const GgufHeader &header, std::size_t shard) {
    const std::uint64_t start = header.end + padding(header.end, header.alignment);
    const std::uint64_t room = file.size() > start ? file.size() - start : 0;
    std::vector<TensorInfo> placed = header.infos;
    std::uint64_t end = 0, data_end = 0;  // of the last tensor with and without padding, from start
    for (TensorInfo &info : placed) {
        if (info.offset != end) {
            throw Error(Fault::malformed, "data of " + info.name + " are not contiguous", file.path(),
                        show(end), show(info.offset));
        }
        data_end = end + info.nbytes;  // both at most the file's size plus an alignment
        if (data_end > room) {
            throw Error(Fault::malformed, "the file ends inside the data of " + info.name, file.path(),
                        show(start + data_end) + " bytes", show(file.size()));
        }
        end = data_end + padding(data_end, header.alignment);
        info.offset += start;
        info.shard = shard;
    }
    const bool empty = placed.empty();
    if (file.size() != (empty ? header.end : start + data_end) && file.size() != (empty ? start : start + end)) {
        throw Error(Fault::malformed, "bytes follow the last tensor", file.path(), show(start + end),
                    show(file.size()));
    }
    check_padding(file, header.end, start);
    for (const TensorInfo &info : placed) {
        const std::uint64_t used = info.offset + info.nbytes;
        check_padding(file, used, used + padding(info.nbytes, header.alignment));
    }
    return placed;
}

std::int64_t integer(const GgufHeader &header, const std::string &key, const std::string &path) {
    const auto found = header.values.find(key);
    if (found == header.values.end() || !found->second.is_integer()) {
        throw Error(Fault::malformed, "not an integer", path, key);
    }
    return found->second.integer;
}

// Name of a shard, from STEM.
std::string shard_path(const std::string &stem, std::int64_t number, std::int64_t count) {
    char suffix[64];
    std::snprintf(suffix, sizeof suffix, "-%05lld-of-%05lld.gguf", static_cast<long long>(number),
                  static_cast<long long>(count));
    return stem + suffix;
}

void check_shard(const File &file, const GgufHeader &header, const GgufHeader &first, std::int64_t shard,
                 std::int64_t count) {
    const std::int64_t number = integer(header, "split.no", file.path());
    const std::int64_t total = integer(header, "split.count", file.path());
    if (number != shard || total != count) {
        throw Error(Fault::malformed, "wrong split.no or split.count", file.path(),
                    show(shard) + ", " + show(count), show(number) + ", " + show(total));
    }
    for (const auto &[key, value] : header.values) {  // a later shard may repeat keys, not change them
        const auto known = first.values.find(key);
        if (known == first.values.end() || key == "split.no" || key == "split.count" ||
            key == "split.tensors.count") {
            continue;
        }
        const Value &other = known->second;
        if (value.type != other.type || value.element != other.element || value.digest != other.digest) {
            throw Error(Fault::malformed, "shards come from different exports", file.path(), "", key);
        }
    }
}

}  // namespace

bool Value::is_integer() const {
    return type <= ValueType::i32 || type == ValueType::u64 || type == ValueType::i64;
}

BlockLayout block_layout(GgmlType type) {
    static constexpr BlockLayout layouts[] = {
        {"F32", 1, 4},        {"F16", 1, 2},       {"Q4_0", 32, 18},     {"Q4_1", 32, 20},
        {"", 0, 0},           {"", 0, 0},          {"Q5_0", 32, 22},     {"Q5_1", 32, 24},
        {"Q8_0", 32, 34},     {"", 0, 0},          {"Q2_K", 256, 84},    {"Q3_K", 256, 110},
        {"Q4_K", 256, 144},   {"Q5_K", 256, 176},  {"Q6_K", 256, 210},   {"", 0, 0},
        {"IQ2_XXS", 256, 66}, {"IQ2_XS", 256, 74}, {"IQ3_XXS", 256, 98}, {"IQ1_S", 256, 50},
        {"IQ4_NL", 32, 18},   {"IQ3_S", 256, 110}, {"IQ2_S", 256, 82},   {"IQ4_XS", 256, 136},
        {"I8", 1, 1},         {"I16", 1, 2},       {"I32", 1, 4},        {"I64", 1, 8},
        {"F64", 1, 8},        {"IQ1_M", 256, 56},  {"BF16", 1, 2},       {"", 0, 0},
        {"", 0, 0},           {"", 0, 0},          {"TQ1_0", 256, 54},   {"TQ2_0", 256, 66},
        {"", 0, 0},           {"", 0, 0},          {"", 0, 0},           {"MXFP4", 32, 17},
        {"NVFP4", 64, 36},    {"Q1_0", 128, 18},   {"Q2_0", 64, 18},
    };
    const auto id = static_cast<std::uint32_t>(type);
    return id < std::size(layouts) ? layouts[id] : BlockLayout{"", 0, 0};
}

std::string show_shape(const std::vector<std::uint64_t> &shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + show(shape[i]);
    return text + (shape.size() == 1 ? ",)" : ")");
}

GgufFile::GgufFile(const std::string &path) {
    files_.push_back(std::make_unique<File>(path));
    const GgufHeader header = parse_header(*files_.front());
    const auto architecture = header.values.find("general.architecture");
    if (architecture == header.values.end() || architecture->second.type != ValueType::string ||
        architecture->second.text.empty()) {
        throw Error(Fault::malformed, "required key is missing or not a non-empty string", path,
                    "general.architecture");
    }
    if (header.values.count("split.count") != 0 && integer(header, "split.count", path) != 1) {
        open_shards(header);
    } else {
        for (TensorInfo &info : place(*files_.front(), header, 0)) tensors_.emplace(info.name, info);
    }
    values_ = header.values;
}

void GgufFile::open_shards(const GgufHeader &first) {
    const std::int64_t count = integer(first, "split.count", path());
    const std::string ending = shard_path("", 1, count);
    const std::size_t slash = path().rfind('/');
    const std::size_t name_begin = slash == std::string::npos ? 0 : slash + 1;
    if (count < 0 || count > 99999 || path().size() - name_begin <= ending.size() ||
        path().compare(path().size() - ending.size(), ending.size(), ending) != 0) {
        throw Error(Fault::malformed, "not the first of its shards", path(), "a name ending in " + ending);
    }
    const std::string stem = path().substr(0, path().size() - ending.size());
    std::vector<GgufHeader> later;
    for (std::int64_t number = 2; number <= count; ++number) {
        const std::string name = shard_path(stem, number, count);
        struct stat status {};
        if (stat(name.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) {
            throw Error(Fault::malformed, "a shard is missing", name, show(count) + " shards");
        }
        files_.push_back(std::make_unique<File>(name));
        later.push_back(parse_header(*files_.back()));
    }
    for (std::size_t shard = 0; shard < files_.size(); ++shard) {
        const GgufHeader &header = shard == 0 ? first : later[shard - 1];
        check_shard(*files_[shard], header, first, static_cast<std::int64_t>(shard), count);
        for (TensorInfo &info : place(*files_[shard], header, shard)) {
            if (!tensors_.emplace(info.name, info).second) {
                throw Error(Fault::malformed, "tensor is in two shards", files_[shard]->path(), "", info.name);
            }
        }
    }
    const std::int64_t promised = integer(first, "split.tensors.count", path());
    if (promised < 0 || tensors_.size() != static_cast<std::size_t>(promised)) {
        throw Error(Fault::malformed, "tensors are missing or left over across the shards", path(),
                    show(promised), show(tensors_.size()));
    }
}

const TensorInfo *GgufFile::find(const std::string &name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
}

const std::uint8_t *GgufFile::data(const TensorInfo &tensor) const {
    return files_[tensor.shard]->map() + tensor.offset;
}

void GgufFile::check_unchanged() const {
    for (const auto &file : files_) file->check_unchanged();
}

std::uint64_t GgufFile::size() const {
    std::uint64_t total = 0;
    for (const auto &file : files_) total += file->size();
    return total;
}

}  // namespace irq
