// A CUDA driver without a device: it accepts modules, and notes the arguments of every launch. For tests/support/launches.py.
#include <cuda.h>
#include <string.h>

#define MOST_LAUNCHES 256
#define MOST_ARGUMENTS 64

#define MOST_HANDLES 4096

typedef struct {
  unsigned long long function, stream;
  unsigned grid[3], threads, shared, overlaps;
  int count;
  unsigned long long arguments[MOST_ARGUMENTS];  // the first 8 bytes of each
  unsigned long long forms[MOST_ARGUMENTS];      // of tensor maps
} Launch;

// The sizes in bytes of a function's arguments, which the driver cannot know, up to the first 0.
unsigned char sizes_of[MOST_HANDLES][MOST_ARGUMENTS];
int launches = 0;
Launch noted[MOST_LAUNCHES];
static unsigned long long next_handle = 1;

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  Launch *launch = &noted[launches++ % MOST_LAUNCHES];
  memset(launch, 0, sizeof *launch);
  launch->function = (unsigned long long)function;
  launch->stream = (unsigned long long)config->hStream;
  unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  memcpy(launch->grid, grid, sizeof grid);
  launch->threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  launch->shared = config->sharedMemBytes;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      launch->overlaps = config->attrs[i].value.programmaticStreamSerializationAllowed;
  const unsigned char *sizes = sizes_of[launch->function % MOST_HANDLES];
  for (int i = 0; i < MOST_ARGUMENTS && sizes[i]; i++) {
    memcpy(&launch->arguments[i], arguments[i], sizes[i] < 8 ? sizes[i] : 8);
    if (sizes[i] == sizeof(CUtensorMap)) memcpy(&launch->forms[i], (char *)arguments[i] + 8, 8);
    launch->count++;
  }
  return CUDA_SUCCESS;
}

// A tensor map holds the address and a checksum of its form.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned long long words[16] = {(unsigned long long)address, 17};
#define ADD(value) words[1] = words[1] * 1099511628211u + (unsigned long long)(value)
  ADD(type), ADD(rank), ADD(interleave), ADD(swizzle), ADD(promotion), ADD(fill);
  for (unsigned i = 0; i < rank; i++) ADD(sizes[i]), ADD(box[i]), ADD(element_strides[i]);
  for (unsigned i = 0; i + 1 < rank; i++) ADD(strides[i]);
  memcpy(map, words, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  unsigned long long words[16] = {(unsigned long long)address};
  memcpy(map, words, sizeof words[0]);
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "no device"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { *value = 232448; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)next_handle++; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)next_handle++; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) { *(CUdeviceptr *)value = pointer; return CUDA_SUCCESS; }
