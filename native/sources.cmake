# The kernels: each instruction set in a file of its own, compiled for it, and chosen when the program runs.
set(OPENELM_SOURCES src/pool.cpp src/product.cpp src/network.cpp src/kernels_plain.cpp)
# Sums keep their order and their rounding: no fused operations but those that are written.
add_compile_options(-ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND OPENELM_SOURCES src/kernels_avx2.cpp src/kernels_avx512.cpp)
  set(OPENELM_AVX2 -mavx2 -mfma -mf16c)
  set_source_files_properties(src/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "${OPENELM_AVX2}")
  set_source_files_properties(src/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
                              "${OPENELM_AVX2};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  list(APPEND OPENELM_SOURCES src/kernels_neon.cpp)
endif()
