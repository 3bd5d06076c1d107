// The kernels of kv.cu as a C program's functions. Compiled into the stand-in and into the test of
// the kernels (check.c).
#include "kv.cu"

#include <string.h>

__thread struct kvx_host *kvx_host;

int kvx_run(const char *kernel, unsigned grid, unsigned block, const unsigned long long *args,
            kvx_translate *translate, void *context)
{
    struct kvx_host host = {.threads = grid * block, .translate = translate, .context = context};
    struct kvx_host *before = kvx_host;
    if (strcmp(kernel, "kvx_copy_sum") != 0) {
        return KVX_NO_KERNEL;
    }
    kvx_host = &host;
    int code = setjmp(host.fault);
    if (code == KVX_OK) {
        for (; host.thread < host.threads; host.thread++) {
            kvx_copy_sum(args[0], args[1], args[2], args[3]);
        }
    }
    kvx_host = before;
    return code;
}
