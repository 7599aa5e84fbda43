// Names what a photo shows, with a .tflite classifier and LiteRT's C API; see README.md.
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "litert.h"

#define CPU_OPTIONS "num_threads = 2\n"  // TOML, as LiteRT wants it

#define DIE(...) (fprintf(stderr, "classify: " __VA_ARGS__), fputc('\n', stderr), exit(1))
#define TRY(call) do { if (call) DIE("LiteRT fails: %s", #call); } while (0)

static char *load(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) DIE("%s: cannot be opened", path);
  *size = (size_t)ftell(file);
  rewind(file);
  char *bytes = malloc(*size + 1);
  if (!bytes || fread(bytes, 1, *size, file) != *size) DIE("%s: cannot be read", path);
  bytes[*size] = 0;
  fclose(file);
  return bytes;
}

static long number(char **at) {  // the next of a PPM's header, behind blanks and comments
  for (; isspace((unsigned char)**at) || **at == '#'; ++*at)
    if (**at == '#') while ((*at)[1] && **at != '\n') ++*at;
  return strtol(*at, at, 10);
}

int main(int count, char **words) {
  int logits = count == 5 && !strcmp(words[4], "--logits");
  if (count != 4 + logits) DIE("usage: classify MODEL.tflite LABELS.txt PHOTO.ppm [--logits]");

  LiteRtEnvironment environment;
  LiteRtEnvOption settings[] = {
      {kLiteRtEnvOptionTagAutoRegisterAccelerators, {kLiteRtAnyTypeInt, {kLiteRtHwAcceleratorCpu}}},
      {kLiteRtEnvOptionTagMinLoggerSeverity, {kLiteRtAnyTypeInt, {kLiteRtLogSeveritySilent}}}};
  TRY(LiteRtCreateEnvironment(2, settings, &environment));
  size_t size;
  char *file = load(words[1], &size);  // the model stays in it
  LiteRtModel model;
  if (size < 8 || memcmp(file + 4, "TFL3", 4) ||
      LiteRtCreateModelFromBuffer(environment, file, size, &model))
    DIE("%s: no .tflite model, or a damaged one", words[1]);
  LiteRtSignature signature;
  LiteRtTensor tensor;
  LiteRtRankedTensorType in, out;
  TRY(LiteRtGetModelSignature(model, 0, &signature));
  TRY(LiteRtGetSignatureInputTensorByIndex(signature, 0, &tensor));
  TRY(LiteRtGetRankedTensorType(tensor, &in));
  TRY(LiteRtGetSignatureOutputTensorByIndex(signature, 0, &tensor));
  TRY(LiteRtGetRankedTensorType(tensor, &out));
  int is_float = in.element_type == kLiteRtElementTypeFloat32;
  const int32_t *shape = in.layout.dimensions, classes = out.layout.dimensions[1];
  if ((!is_float && in.element_type != kLiteRtElementTypeUInt8) || in.layout.rank != 4 ||
      shape[0] != 1 || shape[1] < 1 || shape[2] < 1 || shape[3] != 3 || classes < 1 ||
      out.layout.rank != 2 || out.element_type != kLiteRtElementTypeFloat32)
    DIE("%s: no classifier of one RGB image", words[1]);

  char **names = calloc((size_t)classes, sizeof *names), *text = load(words[2], &size);
  int lines = 0;
  for (char *name = strtok(text, "\r\n"); name; name = strtok(NULL, "\r\n"), lines++)
    if (lines < classes) names[lines] = name;
  if (lines != classes) DIE("%s: %d names, the model has %d", words[2], lines, classes);

  char *photo = load(words[3], &size), *at = photo;
  if (strncmp(photo, "P6", 2)) DIE("%s: no binary PPM (P6)", words[3]);
  at += 2;
  long width = number(&at), height = number(&at), most = number(&at);
  if (height != shape[1] || width != shape[2])
    DIE("%s: %ld x %ld pixels, not %d x %d", words[3], width, height, shape[2], shape[1]);
  size_t values = 3 * (size_t)width * (size_t)height;
  if (most != 255 || (size_t)(photo + size - at++) <= values)  // one blank, then the pixels
    DIE("%s: pixels of other than 8 bits, or cut off", words[3]);

  LiteRtOptions options;
  LiteRtOpaqueOptions cpu;
  LiteRtCompiledModel compiled;
  LiteRtTensorBufferRequirements needs;
  LiteRtTensorBuffer input, output;
  bool all;
  void *data;
  TRY(LiteRtCreateOptions(&options));
  TRY(LiteRtSetOptionsHardwareAccelerators(options, kLiteRtHwAcceleratorCpu));
  TRY(LiteRtCreateOpaqueOptions("xnnpack", strdup(CPU_OPTIONS), free, &cpu));
  TRY(LiteRtAddOpaqueOptions(options, cpu));
  TRY(LiteRtCreateCompiledModel(environment, model, options, &compiled));
  TRY(LiteRtCompiledModelIsFullyAccelerated(compiled, &all));
  if (!all) fprintf(stderr, "classify: XNNPACK does not run all of %s\n", words[1]);
  TRY(LiteRtGetCompiledModelInputBufferRequirements(compiled, 0, 0, &needs));
  TRY(LiteRtCreateManagedTensorBufferFromRequirements(environment, &in, needs, &input));
  TRY(LiteRtGetCompiledModelOutputBufferRequirements(compiled, 0, 0, &needs));
  TRY(LiteRtCreateManagedTensorBufferFromRequirements(environment, &out, needs, &output));

  TRY(LiteRtLockTensorBuffer(input, &data, kLiteRtTensorBufferLockModeWrite));
  for (size_t i = 0; i < values; i++) {
    unsigned char pixel = (unsigned char)at[i];
    if (is_float) ((float *)data)[i] = pixel / 127.5f - 1;
    else ((unsigned char *)data)[i] = pixel;
  }
  TRY(LiteRtUnlockTensorBuffer(input));
  TRY(LiteRtRunCompiledModel(compiled, 0, 1, &input, 1, &output));
  TRY(LiteRtLockTensorBuffer(output, &data, kLiteRtTensorBufferLockModeRead));

  const float *logit = data;
  double most_likely = logit[0], sum = 0;
  for (int i = 0; i < classes; i++) most_likely = fmax(most_likely, logit[i]);
  for (int i = 0; i < classes; i++) sum += exp(logit[i] - most_likely);
  char *shown = calloc((size_t)classes, 1);
  for (int rank = 0; rank < 5 && rank < classes; rank++) {
    int best = -1;
    for (int i = 0; i < classes; i++)
      if (!shown[i] && (best < 0 || logit[i] > logit[best])) best = i;
    shown[best] = 1;
    printf("%8.2f%%  %s\n", 100 * exp(logit[best] - most_likely) / sum, names[best]);
  }
  for (int i = 0; logits && i < classes; i++) printf("%.6f\n", logit[i]);
  TRY(LiteRtUnlockTensorBuffer(output));
  return 0;  // the system takes everything back
}
