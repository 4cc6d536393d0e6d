# Cross-compile for AArch64 and run the tests under qemu (Debian: g++-aarch64-linux-gnu qemu-user):
#   cmake -S runtime -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake \
#         -DIRQ_PYTHON=OFF -DIRQ_TESTS=ON && cmake --build build/aarch64 && ctest --test-dir build/aarch64
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)  # no target libraries to look for at run time
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu max)
