// The compiler looks here last: it reads this file only if torch-sys found no libtorch, and prints the next line.
#include "libtorch was not found: run `make libtorch` in the checkout of tch-moba, or set LIBTORCH to yours (README.md)"
