// Linked against, never installed. The OpenMP runtime that the op library needs is the one that torch has loaded, whose
// file is named differently in every build of torch. This stands for torch's library, through which it is found.

void GOMP_parallel(void) {}
void omp_get_num_threads(void) {}
void omp_get_thread_num(void) {}
