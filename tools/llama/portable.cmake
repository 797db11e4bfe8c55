# Included by CMake at llama-cpp-python's project() for wheels that are made for other machines (build-portable).
include("${CMAKE_CURRENT_LIST_DIR}/lean.cmake")

# Backends are files that ggml loads at run time, one of the processor's for each kind: they are installed, by a
# rule of ggml's own, into the folder of the other libraries, and find these beside them.
set(CMAKE_INSTALL_BINDIR llama_cpp/lib)
set(CMAKE_INSTALL_RPATH "$ORIGIN")

# Messages of ggml name files of its source; without the builder's folders, every machine makes the same bytes.
add_compile_options("-ffile-prefix-map=${CMAKE_SOURCE_DIR}=." "-ffile-prefix-map=${CMAKE_BINARY_DIR}=build")

# A wheel has no links: with versions in their names, each library would lie in it three times, and Python and
# libllama would load two copies of ggml, each with backends of its own.
function(adapt_targets)
  foreach(target llama ggml ggml-base)
    set_property(TARGET ${target} PROPERTY VERSION)
    set_property(TARGET ${target} PROPERTY SOVERSION)
  endforeach()
  set_property(TARGET ggml-rpc PROPERTY UNITY_BUILD OFF) # its files have variables of the same name
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL adapt_targets)
