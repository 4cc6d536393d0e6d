# cmake -DNM=nm -DLIBRARY=libirq.so -DHEADER=irq.h -P exports.cmake: the library exports the header's functions, no more.
file(READ ${HEADER} header)
string(REGEX MATCHALL "IRQ_API [a-z0-9_ ]+[ *]irq_[a-z0-9_]+\\(" declared "${header}")
list(TRANSFORM declared REPLACE ".*[ *](irq_[a-z0-9_]+)\\(" "\\1")
execute_process(COMMAND ${NM} --dynamic --defined-only --format=just-symbols ${LIBRARY} OUTPUT_VARIABLE exported
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" exported "${exported}")
list(SORT declared)
list(SORT exported)
list(LENGTH declared count)
if(count LESS 10 OR NOT declared STREQUAL exported)
  message(FATAL_ERROR "irq.h declares ${declared}; the library exports ${exported}")
endif()
