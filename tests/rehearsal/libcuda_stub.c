/* Stands in for the driver's library where there is none, so that vLLM's CUDA build can be imported. Every call fails. */
int cuInit() { return 100; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuGetErrorName() { return 999; }
int cuGetErrorString() { return 999; }
int cuGetProcAddress() { return 999; }
int cuGetProcAddress_v2() { return 999; }
int cuPointerGetAttribute() { return 999; }
int cuTensorMapEncodeTiled() { return 999; }
