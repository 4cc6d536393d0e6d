// Runs a fuzz target without a fuzzer, the same inputs every time: FOLDER_OR_FILE...
// Every file as it is, then with a few bytes changed, and cut short.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr int changes = 24;  // of every file

std::vector<std::filesystem::path> files_of(const std::filesystem::path &path) {
    if (!std::filesystem::is_directory(path)) return {path};
    std::vector<std::filesystem::path> files;
    for (const auto &entry : std::filesystem::directory_iterator(path)) {
        if (entry.is_regular_file()) files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());  // one order everywhere
    return files;
}

void run(const Bytes &bytes) { LLVMFuzzerTestOneInput(bytes.data(), bytes.size()); }

}  // namespace

int main(int argc, char **argv) {
    std::size_t inputs = 0;
    for (int i = 1; i < argc; ++i) {
        for (const auto &path : files_of(argv[i])) {
            std::ifstream file(path, std::ios::binary);
            const Bytes whole((std::istreambuf_iterator<char>(file)), {});
            run(whole);
            std::mt19937 random(1);
            for (int change = 0; change < changes && !whole.empty(); ++change) {
                Bytes bytes = whole;
                for (int k = 0; k <= change % 4; ++k) bytes[random() % bytes.size()] = static_cast<std::uint8_t>(random());
                if (change % 8 == 7) bytes.resize(random() % bytes.size());
                run(bytes);
            }
            inputs += 1 + changes;
        }
    }
    std::printf("%zu inputs\n", inputs);
    return inputs == 0;
}
