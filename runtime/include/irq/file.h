// A regular file that may change under us.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace irq {

// Remembers device, inode, size and modification time of a file; `read` and `check_unchanged` compare
// again. Headers are read with pread, so that a file that shrinks meanwhile is an error. Tensor data are
// mapped: if the file shrinks *while* it computes, the kernel sends SIGBUS and the process ends, as it
// would for any executable that is cut short. No handler is installed: signals belong to the program,
// not to a library. Between evaluations `check_unchanged` turns the same accident into an Error.
class File {
public:
    // Error: no such file, or not a regular one.
    explicit File(std::string path);
    ~File();
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    const std::string &path() const { return path_; }
    std::uint64_t size() const { return identity_.size; }

    // Copies bytes [offset, offset + size), which must lie in the file. Error: the file changed.
    void read(std::uint64_t offset, void *buffer, std::size_t size) const;

    // The whole file, read-only, mapped on first use and valid as long as this object; null if empty.
    const std::uint8_t *map();

    // Error: size, inode or modification time are no longer what they were.
    void check_unchanged() const;

private:
    struct Identity {
        std::uint64_t device, inode, size, seconds, nanoseconds;
    };
    Identity identity() const;

    std::string path_;
    int descriptor_ = -1;
    Identity identity_{};
    const std::uint8_t *mapping_ = nullptr;
};

}  // namespace irq
