# Included by CMake at llama-cpp-python's project() (CMAKE_PROJECT_llama_cpp_INCLUDE). Its CMakeLists forces
# llama.cpp's "common" library on through the cache; a normal variable of the same name wins (CMP0126, CMP0077),
# so half of the build, and an install step that wants it, fall away. edgemerge uses libllama and ggml alone.
set(LLAMA_BUILD_COMMON OFF)
