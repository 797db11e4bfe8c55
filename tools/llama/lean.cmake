# Included by CMake at llama-cpp-python's project() (CMAKE_PROJECT_llama_cpp_INCLUDE). Its CMakeLists forces
# llama.cpp's "common" library on through the cache; a normal variable of the same name wins (CMP0126, CMP0077),
# so half of the build, and an install step that wants it, fall away. edgemerge uses libllama and ggml alone.
set(LLAMA_BUILD_COMMON OFF)

# The kernels for the processor's own instructions are compiled file by file: several declare the same names, or
# ggml's structures in another way, and which of them would meet in one unit depends on what the processor has
# (with AMX it fails). Deferred, as the target does not exist yet.
cmake_language(DEFER CALL set_target_properties ggml-cpu PROPERTIES UNITY_BUILD OFF)
