# Cross-compiling for 64-bit ARM Linux with Debian's and Ubuntu's g++-aarch64-linux-gnu. Linked statically, what comes
# out runs under qemu-aarch64 without ARM libraries.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
