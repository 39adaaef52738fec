// What this library was built with, for lit_did/ops/extension.py: the CUDA version, then the architectures.
extern "C" __attribute__((visibility("default"))) const char* lit_did_cuda_build() {
  return LIT_DID_CUDA_VERSION " " LIT_DID_CUDA_ARCHITECTURES;
}
