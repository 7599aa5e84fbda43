// The part of LiteRT 2.3.0's C API that classify.c uses, declared by hand under the public names:
// the pip package ai-edge-litert holds libLiteRt.so but no headers. Each section names the header
// it stands for in google-ai-edge/LiteRT on GitHub (Apache-2.0).
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// litert/c/litert_common.h
typedef int LiteRtStatus;  // 0 is kLiteRtStatusOk
typedef struct LiteRtEnvironmentT *LiteRtEnvironment;
typedef struct LiteRtModelT *LiteRtModel;
typedef struct LiteRtSignatureT *LiteRtSignature;
typedef struct LiteRtTensorT *LiteRtTensor;
typedef struct LiteRtOptionsT *LiteRtOptions;
typedef struct LiteRtOpaqueOptionsT *LiteRtOpaqueOptions;
typedef struct LiteRtCompiledModelT *LiteRtCompiledModel;
typedef struct LiteRtTensorBufferRequirementsT *LiteRtTensorBufferRequirements;
typedef struct LiteRtTensorBufferT *LiteRtTensorBuffer;
enum { kLiteRtHwAcceleratorCpu = 1 };
enum { kLiteRtTensorBufferLockModeRead = 0, kLiteRtTensorBufferLockModeWrite = 1 };

// litert/c/litert_any.h, litert_environment_options.h, internal/litert_logging.h
typedef struct {
  int type;  // of an enum, like each int here
  union { int64_t int_value; const void *ptr_value; };
} LiteRtAny;
typedef struct {
  int tag;
  LiteRtAny value;
} LiteRtEnvOption;
enum { kLiteRtAnyTypeInt = 2, kLiteRtLogSeveritySilent = 4 };
enum {
  kLiteRtEnvOptionTagAutoRegisterAccelerators = 24,
  kLiteRtEnvOptionTagMinLoggerSeverity = 25,
};

// litert/c/litert_layout.h, litert_model_types.h
typedef struct {
  unsigned rank : 7;
  bool has_strides : 1;
  int32_t dimensions[8];
  uint32_t strides[8];
} LiteRtLayout;
typedef struct {
  int element_type;
  LiteRtLayout layout;
} LiteRtRankedTensorType;
_Static_assert(sizeof(LiteRtRankedTensorType) == 72, "laid out otherwise than in LiteRT");
enum { kLiteRtElementTypeFloat32 = 1, kLiteRtElementTypeUInt8 = 3 };

// litert/c/litert_environment.h, litert_model.h
LiteRtStatus LiteRtCreateEnvironment(int, const LiteRtEnvOption *, LiteRtEnvironment *);
LiteRtStatus LiteRtCreateModelFromBuffer(LiteRtEnvironment, const void *, size_t, LiteRtModel *);
LiteRtStatus LiteRtGetModelSignature(LiteRtModel, size_t, LiteRtSignature *);
LiteRtStatus LiteRtGetSignatureInputTensorByIndex(LiteRtSignature, size_t, LiteRtTensor *);
LiteRtStatus LiteRtGetSignatureOutputTensorByIndex(LiteRtSignature, size_t, LiteRtTensor *);
LiteRtStatus LiteRtGetRankedTensorType(LiteRtTensor, LiteRtRankedTensorType *);

// litert/c/litert_options.h, litert_opaque_options.h
LiteRtStatus LiteRtCreateOptions(LiteRtOptions *);
LiteRtStatus LiteRtSetOptionsHardwareAccelerators(LiteRtOptions, int);
LiteRtStatus LiteRtCreateOpaqueOptions(
    const char *name, void *payload, void (*destroy)(void *), LiteRtOpaqueOptions *);
LiteRtStatus LiteRtAddOpaqueOptions(LiteRtOptions, LiteRtOpaqueOptions);

// litert/c/litert_compiled_model.h
LiteRtStatus LiteRtCreateCompiledModel(
    LiteRtEnvironment, LiteRtModel, LiteRtOptions, LiteRtCompiledModel *);
LiteRtStatus LiteRtCompiledModelIsFullyAccelerated(LiteRtCompiledModel, bool *);
LiteRtStatus LiteRtGetCompiledModelInputBufferRequirements(
    LiteRtCompiledModel, size_t signature, size_t index, LiteRtTensorBufferRequirements *);
LiteRtStatus LiteRtGetCompiledModelOutputBufferRequirements(
    LiteRtCompiledModel, size_t signature, size_t index, LiteRtTensorBufferRequirements *);
LiteRtStatus LiteRtRunCompiledModel(
    LiteRtCompiledModel, size_t, size_t, LiteRtTensorBuffer *, size_t, LiteRtTensorBuffer *);

// litert/c/litert_tensor_buffer.h
LiteRtStatus LiteRtCreateManagedTensorBufferFromRequirements(
    LiteRtEnvironment, const LiteRtRankedTensorType *, LiteRtTensorBufferRequirements,
    LiteRtTensorBuffer *);
LiteRtStatus LiteRtLockTensorBuffer(LiteRtTensorBuffer, void **, int mode);
LiteRtStatus LiteRtUnlockTensorBuffer(LiteRtTensorBuffer);
