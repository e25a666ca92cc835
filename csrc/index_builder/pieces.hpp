// Documents laid end to end: where their blocks begin, and cutting a sample out of them.

#pragma once

#include "module.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

// Collects the pieces of documents that lie at token positions [skip, skip + length) of a line of documents.
class PieceCutter {
public:
    PieceCutter(int64_t skip, int64_t length) : skip_(skip), left_(length) {}

    // Lays the next document; false once the sample is whole.
    bool lay(int64_t document, int64_t length) {
        if (length <= skip_) {
            skip_ -= length;
            return true;
        }
        const int64_t taken = std::min(length - skip_, left_);
        documents_.push_back(document);
        starts_.push_back(skip_);
        lengths_.push_back(taken);
        skip_ = 0;
        left_ -= taken;
        return left_ > 0;
    }

    bool done() const { return left_ == 0; }

    // int64 documents, starts, lengths: the fields of megazebra.data.index.order.Pieces.
    py::tuple pieces() const { return py::make_tuple(as_array(documents_), as_array(starts_), as_array(lengths_)); }

private:
    static py::array_t<int64_t> as_array(const std::vector<int64_t>& values) {
        return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
    }

    int64_t skip_, left_;
    std::vector<int64_t> documents_, starts_, lengths_;
};

// int64 [blocks + 1]: where each block of `block_documents` of `count` documents begins, and the end of the last.
// tokens_of(first, last): the tokens of documents [first, last).
template <class TokensOf>
py::array_t<int64_t> lay_blocks(int64_t count, int64_t block_documents, TokensOf tokens_of) {
    py::array_t<int64_t> result((count + block_documents - 1) / block_documents + 1);
    int64_t* starts = result.mutable_data();
    const py::gil_scoped_release release;
    int64_t tokens = 0;
    *starts++ = tokens;
    for (int64_t first = 0; first < count; first += block_documents) {
        tokens += tokens_of(first, std::min(first + block_documents, count));
        *starts++ = tokens;
    }
    return result;
}

// The block that holds a token position: starts int64 [blocks + 1], rising from 0.
inline py::ssize_t block_at(const py::array_t<int64_t>& starts, int64_t position) {
    const int64_t* begin = starts.data();
    return std::upper_bound(begin, begin + starts.size(), position) - begin - 1;
}
