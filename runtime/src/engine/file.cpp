#include "irq/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "irq/error.h"

namespace irq {
namespace {

[[noreturn]] void changed(const std::string &path) {
    throw Error(Fault::malformed, "the file changed while it was being read", path, "", "",
                "Is it still being written?");
}

}  // namespace

File::File(std::string path) : path_(std::move(path)) {
    descriptor_ = open(path_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // a FIFO must not hang
    if (descriptor_ < 0) throw Error(Fault::usage, "cannot be opened", path_, "", std::strerror(errno));
    try {
        identity_ = identity();
    } catch (...) {
        close(descriptor_);
        throw;
    }
}

File::~File() {
    if (mapping_ != nullptr) munmap(const_cast<std::uint8_t *>(mapping_), identity_.size);
    close(descriptor_);
}

File::Identity File::identity() const {
    struct stat status {};
    if (fstat(descriptor_, &status) != 0) changed(path_);
    if (!S_ISREG(status.st_mode)) throw Error(Fault::malformed, "not a regular file", path_);
    return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino),
            static_cast<std::uint64_t>(status.st_size), static_cast<std::uint64_t>(status.st_mtim.tv_sec),
            static_cast<std::uint64_t>(status.st_mtim.tv_nsec)};
}

void File::check_unchanged() const {
    const Identity now = identity();
    if (now.size != identity_.size || now.seconds != identity_.seconds ||
        now.nanoseconds != identity_.nanoseconds) {
        changed(path_);
    }
}

void File::read(std::uint64_t offset, void *buffer, std::size_t size) const {
    if (size > this->size() || offset > this->size() - size) {
        throw Error(Fault::malformed, "data lies outside the file", path_,
                    "at most " + show(this->size()) + " bytes", show(offset) + " + " + show(size));
    }
    check_unchanged();
    auto *to = static_cast<char *>(buffer);
    while (size > 0) {
        const ssize_t count = pread(descriptor_, to, size, static_cast<off_t>(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) changed(path_);
        to += count;
        offset += static_cast<std::uint64_t>(count);
        size -= static_cast<std::size_t>(count);
    }
}

const std::uint8_t *File::map() {
    if (mapping_ == nullptr && size() > 0) {
        check_unchanged();
        void *address = mmap(nullptr, size(), PROT_READ, MAP_SHARED, descriptor_, 0);
        if (address == MAP_FAILED) {
            throw Error(Fault::usage, "cannot be mapped", path_, "", std::strerror(errno));
        }
        mapping_ = static_cast<const std::uint8_t *>(address);
    }
    return mapping_;
}

}  // namespace irq
