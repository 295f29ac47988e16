// Start the kernels of a repeated call. A program holds what the launches have in common with the recorded call; the addresses come with each start.
// See native.py.
#include <cuda.h>
#include <dlfcn.h>
#include <stdbool.h>
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define MOST_PARAMETERS 96
#define MOST_BYTES 2048  // of the parameters of one launch
#define ALIGNMENT 128    // of a tensor map

typedef struct {  // what Triton's `make_tensordesc_arg` returns
  PyObject_HEAD;
  _Alignas(128) CUtensorMap map;
} TensorMap;

typedef struct {
  int at, slot;  // where in the parameters' bytes; which address
  unsigned long long offset;
  bool is_map;
} Place;

typedef struct {
  CUfunction function;
  CUlaunchConfig config;
  CUlaunchAttribute overlap;
  int parameters, places, bytes;
  int at[MOST_PARAMETERS];
  Place place[MOST_PARAMETERS];
  _Alignas(ALIGNMENT) unsigned char data[MOST_BYTES];
} Launch;

typedef struct {
  int count, places;
  Launch launch[];
} Program;

static CUresult (*launch_kernel)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*replace_address)(CUtensorMap *, void *);
static CUresult (*error_text)(CUresult, const char **);
static CUresult (*current_context)(CUcontext *);
static CUresult (*set_context)(CUcontext);
static CUresult (*get_device)(CUdevice *, int);
static CUresult (*retain_context)(CUcontext *, CUdevice);

static void free_program(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, "fastlora.launches")); }

static bool add_bytes(Launch *launch, const void *bytes, Py_ssize_t size, Py_ssize_t alignment) {
  int at = (launch->bytes + (int)alignment - 1) / (int)alignment * (int)alignment;
  if (launch->parameters == MOST_PARAMETERS || size > MOST_BYTES - at) {
    PyErr_SetString(PyExc_ValueError, "too many parameters for one kernel");
    return false;
  }
  memcpy(launch->data + at, bytes, size);
  launch->at[launch->parameters++] = at;
  launch->bytes = at + (int)size;
  return true;
}

// (content, slot, offset): bytes, or a tensor map; slot -1 if no address belongs there.
static bool add_parameter(Launch *launch, PyObject *parameter) {
  PyObject *content;
  int slot;
  unsigned long long offset;
  if (!PyArg_ParseTuple(parameter, "OiK", &content, &slot, &offset)) return false;
  bool is_map = !PyBytes_Check(content);
  if (is_map && Py_TYPE(content)->tp_basicsize != sizeof(TensorMap)) {
    PyErr_Format(PyExc_TypeError, "expected bytes or a tensor map, got %s", Py_TYPE(content)->tp_name);
    return false;
  }
  if (is_map ? !add_bytes(launch, &((TensorMap *)content)->map, sizeof(CUtensorMap), ALIGNMENT)
             : !add_bytes(launch, PyBytes_AS_STRING(content), PyBytes_GET_SIZE(content), 8))
    return false;
  if (slot >= 0) {
    Place place = {launch->at[launch->parameters - 1], slot, offset, is_map};
    launch->place[launch->places++] = place;
  }
  return true;
}

// (function, grid, threads, shared memory in bytes, whether it may overlap the launch before it, parameters)
static bool add_launch(Launch *launch, PyObject *described) {
  unsigned long long function;
  int overlaps;
  PyObject *parameters;
  CUlaunchConfig *config = &launch->config;
  memset(launch, 0, sizeof *launch);
  if (!PyArg_ParseTuple(described, "K(III)IIpO!", &function, &config->gridDimX, &config->gridDimY, &config->gridDimZ,
                        &config->blockDimX, &config->sharedMemBytes, &overlaps, &PyList_Type, &parameters))
    return false;
  launch->function = (CUfunction)function;
  config->blockDimY = config->blockDimZ = 1;
  config->numAttrs = overlaps;
  launch->overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  launch->overlap.value.programmaticStreamSerializationAllowed = 1;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(parameters); i++)
    if (!add_parameter(launch, PyList_GET_ITEM(parameters, i))) return false;
  return true;
}

static PyObject *prepare(PyObject *self, PyObject *launches) {
  if (!PyList_Check(launches)) return PyErr_Format(PyExc_TypeError, "expected a list of launches");
  Py_ssize_t count = PyList_GET_SIZE(launches);
  Program *program = NULL;
  if (posix_memalign((void **)&program, ALIGNMENT, sizeof(Program) + ALIGNMENT + count * sizeof(Launch)))
    return PyErr_NoMemory();
  program->count = (int)count;
  program->places = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (!add_launch(&program->launch[i], PyList_GET_ITEM(launches, i))) {
      free(program);
      return NULL;
    }
    program->places += program->launch[i].places;
  }
  return PyCapsule_New(program, "fastlora.launches", free_program);
}

static CUresult make_context_current(int device) {  // a new thread has none
  CUcontext context;
  CUdevice handle;
  CUresult code = current_context(&context);
  if (code != CUDA_SUCCESS || context) return code;
  if ((code = get_device(&handle, device)) != CUDA_SUCCESS) return code;
  if ((code = retain_context(&context, handle)) != CUDA_SUCCESS) return code;
  return set_context(context);
}

static CUresult start_one(const Launch *launch, CUstream stream, const unsigned long long *addresses) {
  _Alignas(ALIGNMENT) unsigned char data[MOST_BYTES];
  void *parameters[MOST_PARAMETERS];
  CUlaunchConfig config = launch->config;
  CUlaunchAttribute overlap = launch->overlap;
  config.hStream = stream;
  config.attrs = &overlap;
  memcpy(data, launch->data, launch->bytes);
  for (int i = 0; i < launch->places; i++) {
    const Place *place = &launch->place[i];
    unsigned long long address = addresses[i] + place->offset;
    if (!place->is_map) {
      memcpy(data + place->at, &address, sizeof address);
      continue;
    }
    CUresult code = replace_address((CUtensorMap *)(data + place->at), (void *)address);
    if (code != CUDA_SUCCESS) return code;
  }
  for (int i = 0; i < launch->parameters; i++) parameters[i] = data + launch->at[i];
  return launch_kernel(&config, launch->function, parameters, NULL);
}

// start(program, addresses, stream, device)
static PyObject *start(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 4 || !PyList_Check(arguments[1]))
    return PyErr_Format(PyExc_TypeError, "expected a program, a list of addresses, a stream and a device");
  Program *program = PyCapsule_GetPointer(arguments[0], "fastlora.launches");
  if (!program) return NULL;
  PyObject *list = arguments[1];
  CUstream stream = (CUstream)PyLong_AsUnsignedLongLong(arguments[2]);
  int device = (int)PyLong_AsLong(arguments[3]);
  unsigned long long addresses[program->places + 1];
  int found = 0;
  for (int i = 0; i < program->count; i++)
    for (int j = 0; j < program->launch[i].places; j++) {
      int slot = program->launch[i].place[j].slot;
      if (slot >= PyList_GET_SIZE(list)) return PyErr_Format(PyExc_IndexError, "no address %d", slot);
      addresses[found++] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(list, slot));
    }
  if (PyErr_Occurred()) return NULL;
  CUresult code;
  Py_BEGIN_ALLOW_THREADS;
  code = make_context_current(device);
  found = 0;
  for (int i = 0; i < program->count && code == CUDA_SUCCESS; i++) {
    code = start_one(&program->launch[i], stream, addresses + found);
    found += program->launch[i].places;
  }
  Py_END_ALLOW_THREADS;
  if (code != CUDA_SUCCESS) {
    const char *text = NULL;
    error_text(code, &text);
    return PyErr_Format(PyExc_RuntimeError, "launching a kernel failed: %s", text ? text : "unknown error");
  }
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"prepare", prepare, METH_O, "A program of launches."},
    {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL, "Start its kernels."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastlora_launches", NULL, -1, methods};

static bool find(void *library, const char *name, void *function) {
  *(void **)function = dlsym(library, name);
  if (!*(void **)function) PyErr_Format(PyExc_ImportError, "libcuda.so.1 has no %s", name);
  return *(void **)function;
}

PyMODINIT_FUNC PyInit_fastlora_launches(void) {
  void *library = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!library) return PyErr_Format(PyExc_ImportError, "libcuda.so.1: %s", dlerror());
  if (!find(library, "cuLaunchKernelEx", &launch_kernel) || !find(library, "cuTensorMapReplaceAddress", &replace_address) ||
      !find(library, "cuGetErrorString", &error_text) || !find(library, "cuCtxGetCurrent", &current_context) ||
      !find(library, "cuCtxSetCurrent", &set_context) || !find(library, "cuDeviceGet", &get_device) ||
      !find(library, "cuDevicePrimaryCtxRetain", &retain_context))
    return NULL;
  return PyModule_Create(&module);
}
