#!/bin/sh
# pkg_config.sh PREFIX LIBDIR OUT EXAMPLE.c CC [FLAG...]: compiles the example as a user of pkg-config does.
set -eu
prefix=$1 libdir=$2 out=$3 source=$4
shift 4
export PKG_CONFIG_PATH="$prefix/$libdir/pkgconfig"
"$@" "$source" $(pkg-config --cflags --libs irq) "-Wl,-rpath,$prefix/$libdir" -o "$out"
