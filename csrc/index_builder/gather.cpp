// The tokens of many pieces of documents in one call: what a sample is made of.

#include "module.hpp"

#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are stored little-endian and read as they lie");

using namespace py::literals;

namespace {

constexpr int64_t BUFFER_BYTES = 64 * 1024;  // stays in the cache between pread and widening

struct Pieces {
    int64_t count;
    const int64_t *documents, *starts, *lengths;
};

// Where documents begin: `offsets` in bytes, or when it is null the token positions of every block of documents.
template <class Length>
struct Layout {
    const Length* lengths;
    int64_t documents;
    const int64_t* block_starts;
    int64_t block_documents;
    const int64_t* offsets;
    int64_t token_bytes;

    int64_t begin(int64_t document) const {
        if (offsets) return offsets[document];
        const int64_t block = document / block_documents;
        int64_t position = block_starts[block];
        for (int64_t before = block * block_documents; before < document; ++before) position += lengths[before];
        return position * token_bytes;
    }
};

// The tokens of all pieces, and the byte each begins at; -1 unless every piece lies in its document.
template <class Length>
int64_t place(const Layout<Length>& layout, const Pieces& pieces, std::vector<int64_t>& begins) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < pieces.count; ++i) {
        const int64_t document = pieces.documents[i], start = pieces.starts[i], length = pieces.lengths[i];
        if (document < 0 || document >= layout.documents || start < 0 || length < 0 ||
            start > layout.lengths[document] - length ||
            length > std::numeric_limits<int64_t>::max() / layout.token_bytes - tokens)
            return -1;
        begins.push_back(layout.begin(document) + start * layout.token_bytes);
        tokens += length;
    }
    return tokens;
}

// False at the end of the file and on errors.
bool read_exactly(int file, char* target, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t got = pread(file, target, static_cast<size_t>(bytes), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        target += got;
        offset += got;
        bytes -= got;
    }
    return true;
}

// Reads `count` tokens from byte `offset` and widens them; false when they can't be read or an id is not in
// [0, largest_id].
template <class Token>
bool read_tokens(int file, int64_t offset, int64_t count, int64_t largest_id, int64_t* out) {
    // Negative ids are large ones when taken as unsigned.
    using Unsigned = std::make_unsigned_t<Token>;
    const auto largest = static_cast<Unsigned>(std::min<int64_t>(largest_id, std::numeric_limits<Token>::max()));
    constexpr int64_t CAPACITY = BUFFER_BYTES / sizeof(Token);
    alignas(64) Token buffer[CAPACITY];
    while (count > 0) {
        const int64_t taken = std::min(count, CAPACITY);
        const int64_t bytes = taken * static_cast<int64_t>(sizeof(Token));
        if (!read_exactly(file, reinterpret_cast<char*>(buffer), bytes, offset)) return false;
        Unsigned outside = 0;
        for (int64_t i = 0; i < taken; ++i) outside |= static_cast<Unsigned>(buffer[i]) > largest;
        if (outside) return false;
        for (int64_t i = 0; i < taken; ++i) out[i] = buffer[i];
        out += taken;
        offset += bytes;
        count -= taken;
    }
    return true;
}

using TokenReader = bool (*)(int, int64_t, int64_t, int64_t, int64_t*);

TokenReader reader_of(const py::dtype& type) {
    const bool is_unsigned = type.kind() == 'u';
    switch (type.itemsize()) {
        case 1: return is_unsigned ? read_tokens<uint8_t> : read_tokens<int8_t>;
        case 2: return is_unsigned ? read_tokens<uint16_t> : read_tokens<int16_t>;
        case 4: return read_tokens<int32_t>;
        default: return read_tokens<int64_t>;
    }
}

template <class Length>
std::optional<Integers> gather(const Array<Length>& lengths, const Integers& block_starts, int64_t block_documents,
                               const std::optional<Integers>& offsets, int file, const py::dtype& token_type,
                               int64_t largest_id, const Integers& documents, const Integers& starts,
                               const Integers& piece_lengths, std::optional<Integers> out) {
    const Layout<Length> layout{lengths.data(),  lengths.size(), block_starts.data(),
                                block_documents, offsets ? offsets->data() : nullptr, token_type.itemsize()};
    const Pieces pieces{documents.size(), documents.data(), starts.data(), piece_lengths.data()};
    const TokenReader read = reader_of(token_type);
    std::vector<int64_t> begins;
    begins.reserve(static_cast<size_t>(pieces.count));
    const int64_t tokens = place(layout, pieces, begins);
    if (tokens < 0 || (out && out->size() != tokens)) return std::nullopt;
    if (!out) out.emplace(tokens);
    int64_t* target = out->mutable_data();

    const py::gil_scoped_release release;
    for (int64_t first = 0, next; first < pieces.count; first = next) {
        int64_t count = pieces.lengths[first];  // of the pieces that touch on disk
        for (next = first + 1; next < pieces.count; ++next) {
            if (begins[next] != begins[first] + count * layout.token_bytes) break;
            count += pieces.lengths[next];
        }
        if (!read(file, begins[first], count, largest_id, target)) return std::nullopt;
        target += count;
    }
    return out;
}

}  // namespace

// Tokens of pieces of documents, int64 [sum of piece_lengths], in `out` where it is given. None when something is
// wrong; the numpy twin, Corpus.read piece by piece, puts it into words.
void bind_gather(py::module_& module) {
    const auto lengths = py::arg("lengths").noconvert();
    const auto out = py::arg("out").noconvert();
    module.def("gather", &gather<int32_t>, lengths, "block_starts"_a, "block_documents"_a, "offsets"_a, "file"_a,
               "token_type"_a, "largest_id"_a, "documents"_a, "starts"_a, "piece_lengths"_a, out);
    module.def("gather", &gather<int64_t>, lengths, "block_starts"_a, "block_documents"_a, "offsets"_a, "file"_a,
               "token_type"_a, "largest_id"_a, "documents"_a, "starts"_a, "piece_lengths"_a, out);
}
