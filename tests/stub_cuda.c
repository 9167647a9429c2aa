/* A driver library without a card: what Triton's launcher calls, with the checks that a card makes.

   `stub_driver.py` compiles this as libcuda.so.1 for a process of its own. Addresses are numbers that it has registered;
   nothing is ever read there. The last launch can be asked for: grid, block, shared memory and the values of the
   parameters, as many and as long as the kernel's own machine code says. */

#include "cuda.h"
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define MOST 64 /* parameters of a kernel */
#define ALLOCATIONS 4096
#define REGISTERS 65536 /* of a multiprocessor, and of a block */

typedef struct {
  char name[256];
  int registers;
  int parameters;
  int bytes[MOST];
  int shared_limit; /* dynamic, as last set; 48 KiB before */
} Function;

typedef struct {
  unsigned grid[3], block[3], shared;
  uint64_t stream;
  int parameters;
  uint64_t value[MOST]; /* the first eight bytes */
  int bytes[MOST];
  int count;
} Launch;

static Function functions[8192];
static int loaded;
static uint64_t starts[ALLOCATIONS], ends[ALLOCATIONS];
static int allocations;
static int optin = 232448, per_multiprocessor = 233472, multiprocessors = 132;
static char complaint[512];
Launch stub_last;

void stub_card(int shared_optin, int shared_total, int count) {
  optin = shared_optin, per_multiprocessor = shared_total, multiprocessors = count;
}
void stub_forget(void) { allocations = 0, stub_last.count = 0; }
int stub_allocate(uint64_t start, uint64_t bytes) {
  if (allocations == ALLOCATIONS) return 0;
  starts[allocations] = start, ends[allocations++] = start + bytes;
  return 1;
}
const char *stub_complaint(void) { return complaint; }
int stub_registers(uint64_t function) { return ((Function *)function)->registers; }

static CUresult refuse(CUresult code, const char *words) {
  snprintf(complaint, sizeof complaint, "%s", words);
  return code;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = complaint[0] ? complaint : "refused";
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = optin; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = per_multiprocessor; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
  default: return refuse(CUDA_ERROR_INVALID_VALUE, "an attribute that this driver does not know");
  }
  return CUDA_SUCCESS;
}

/* Attributes of machine code. EIATTR_KPARAM_INFO: index, then ordinal and offset (16 bits each), then flags whose upper
   14 bits are the size. EIATTR_REGCOUNT: symbol of the kernel, registers; there is one kernel in Triton's code. */
static void read_attributes(Function *function, const uint8_t *data, size_t length) {
  size_t i = 0;
  while (i + 4 <= length) {
    uint8_t format = data[i], attribute = data[i + 1];
    uint16_t size = (uint16_t)(data[i + 2] | data[i + 3] << 8);
    i += 4;
    if (format != 4) continue; /* the value stands in the size's place */
    if (attribute == 0x17 && i + 12 <= length) {
      uint16_t ordinal;
      uint32_t flags;
      memcpy(&ordinal, data + i + 4, 2), memcpy(&flags, data + i + 8, 4);
      if (ordinal < MOST) {
        function->bytes[ordinal] = (int)(flags >> 18);
        if (ordinal >= function->parameters) function->parameters = ordinal + 1;
      }
    }
    if (attribute == 0x2f && i + 8 <= length) function->registers = data[i + 4];
    i += size;
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  const uint8_t *image = (const uint8_t *)module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "no machine code");
  if (loaded == (int)(sizeof functions / sizeof *functions)) return refuse(CUDA_ERROR_OUT_OF_MEMORY, "too many kernels");
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  char text[300], info[300];
  snprintf(text, sizeof text, ".text.%s", name), snprintf(info, sizeof info, ".nv.info.%s", name);
  Function *function = &functions[loaded];
  int code = 0;
  memset(function, 0, sizeof *function);
  snprintf(function->name, sizeof function->name, "%s", name);
  function->shared_limit = 49152;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *section = names + sections[i].sh_name;
    code |= !strcmp(section, text);
    if (!strcmp(section, info) || !strcmp(section, ".nv.info")) read_attributes(function, image + sections[i].sh_offset, sections[i].sh_size);
  }
  if (!code) return refuse(CUDA_ERROR_NOT_FOUND, "no kernel of this name in the machine code");
  loaded++;
  return *found = (CUfunction)function, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  Function *function = (Function *)handle;
  int warp = (function->registers + 7) / 8 * 8 * 32; /* registers are given out in eights per thread */
  int threads = warp ? REGISTERS / warp / 4 * 4 * 32 : 1024; /* four schedulers, each with a quarter of them */
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = threads < 1024 ? threads : 1024; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  default: return refuse(CUDA_ERROR_INVALID_VALUE, "an attribute that this driver does not know");
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > optin) return refuse(CUDA_ERROR_INVALID_VALUE, "more shared memory than a block can have");
  return ((Function *)handle)->shared_limit = value, CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  for (int i = 0; i < allocations; i++)
    if (starts[i] <= pointer && pointer < ends[i]) return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_VALUE, "no memory of the card");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  Function *function = (Function *)handle;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) return refuse(CUDA_ERROR_INVALID_VALUE, "no program");
  if (config->gridDimX > 0x7FFFFFFF || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "a grid beyond 2**31 - 1, 65535, 65535");
  if (!threads || threads > 1024) return refuse(CUDA_ERROR_INVALID_VALUE, "more than 1024 threads");
  if ((int)config->sharedMemBytes > function->shared_limit)
    return refuse(CUDA_ERROR_INVALID_VALUE, "more shared memory than was asked for");
  int most;
  cuFuncGetAttribute(&most, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, handle);
  if ((int)threads > most) return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "more registers than there are");
  memcpy(stub_last.grid, &config->gridDimX, sizeof stub_last.grid);
  memcpy(stub_last.block, &config->blockDimX, sizeof stub_last.block);
  stub_last.shared = config->sharedMemBytes, stub_last.stream = (uint64_t)config->hStream;
  stub_last.parameters = function->parameters;
  for (int i = 0; i < function->parameters; i++) {
    int bytes = stub_last.bytes[i] = function->bytes[i];
    stub_last.value[i] = 0;
    memcpy(&stub_last.value[i], parameters[i], bytes < 8 ? bytes : 8);
  }
  stub_last.count++;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = multiprocessors, CUDA_SUCCESS;
}

/* The rules of cuTensorMapEncodeTiled without interleaving, from NVIDIA's description of the driver API. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const int bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widest[] = {0, 32, 64, 128};
  CUdeviceptr checked;
  if ((unsigned)type > 12 || rank < 1 || rank > 5) return refuse(CUDA_ERROR_INVALID_VALUE, "type or rank of a tensor map");
  if ((uint64_t)address % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "a tensor map whose address is no multiple of 16");
  if (cuPointerGetAttribute(&checked, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, (CUdeviceptr)address)) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32) return refuse(CUDA_ERROR_INVALID_VALUE, "size of a tensor map");
    if (!box[i] || box[i] > 256) return refuse(CUDA_ERROR_INVALID_VALUE, "a box of more than 256");
    if (!steps[i] || steps[i] > 8) return refuse(CUDA_ERROR_INVALID_VALUE, "steps of a tensor map");
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < sizes[0] * bytes_of[type]))
      return refuse(CUDA_ERROR_INVALID_VALUE, "strides of a tensor map");
  }
  unsigned inner = box[0] * bytes_of[type];
  if (inner % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "rows of a box that are no multiple of 16 bytes");
  if (swizzle && inner > widest[swizzle]) return refuse(CUDA_ERROR_INVALID_VALUE, "rows of a box wider than the swizzle");
  memset(map, 0, sizeof *map), memcpy(map, &address, sizeof address);
  return CUDA_SUCCESS;
}
