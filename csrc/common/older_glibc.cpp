// libstdc++'s shared pointers read this variable of glibc 2.32 to leave out atomic instructions in programs of one
// thread. Torch runs with older ones, and its programs have threads: the library has a variable of its own.

extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
