// Headers of torch 2.11 call std::ostringstream::str() const&, which C++20 made a function of its own
// and libstdc++ has from GCC 11 on. Defined here, a wheel runs wherever torch's own wheel does.

#include <sstream>

#ifdef __GLIBCXX__
template std::string std::basic_stringbuf<char>::str() const&;
#endif
