// similarity WEIGHTS TEXT TEXT...: prints the cosine of the first text with each of the others.
//
//     tilewright compile models/minilm-l6-80-4x1 --emit c-library --name minilm -o build/minilm
//     make -C examples/cpp && examples/cpp/similarity build/minilm/minilm.safetensors "lunch" "Somebody eats." "It rains."
//
// All texts run as one batch, without padding.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "minilm.h"

namespace
{

void check(minilm_status status)
{
    if (status != MINILM_OK) throw std::runtime_error(minilm_error());
}

// Sentence embeddings, one vector for each text.
class Embedder
{
public:
    explicit Embedder(const std::string &weights)
    {
        minilm_engine *engine = nullptr;
        check(minilm_open(weights.empty() ? nullptr : weights.c_str(), nullptr, &engine));
        engine_.reset(engine);
        const minilm_info &info = *minilm_describe(engine);
        while (output_ < info.outputs && std::string(info.output[output_].name) != "sentence_embedding") ++output_;
        if (output_ == info.outputs) throw std::runtime_error("the model gives no sentence_embedding");
    }

    std::vector<std::vector<float>> operator()(const std::vector<std::string> &texts)
    {
        const minilm_info &info = *minilm_describe(engine_.get());
        const std::size_t longest = static_cast<std::size_t>(info.max_positions);
        std::vector<std::int64_t> ids, offsets{0};
        for (const std::string &text : texts) {
            const std::size_t start = ids.size();
            const minilm_text piece{text.data(), text.size()};
            std::size_t tokens = 0;
            ids.resize(start + longest);
            check(minilm_tokenize(engine_.get(), &piece, 1, 1, ids.data() + start, nullptr, longest, &tokens));
            ids.resize(start + tokens);
            offsets.push_back(static_cast<std::int64_t>(ids.size()));
        }
        const std::size_t width = static_cast<std::size_t>(info.output[output_].width);
        std::vector<float> values(texts.size() * width);
        std::vector<float *> outputs(info.outputs, nullptr); // those that are not wanted
        outputs[output_] = values.data();
        check(minilm_run_ragged(engine_.get(), ids.data(), nullptr, offsets.data(), texts.size(), outputs.data()));
        std::vector<std::vector<float>> result;
        for (std::size_t i = 0; i < texts.size(); ++i) {
            const auto first = values.begin() + static_cast<std::ptrdiff_t>(i * width);
            result.emplace_back(first, first + static_cast<std::ptrdiff_t>(width));
        }
        return result;
    }

private:
    struct Close {
        void operator()(minilm_engine *engine) const { minilm_close(engine); }
    };
    std::unique_ptr<minilm_engine, Close> engine_;
    std::size_t output_ = 0;
};

double cosine(const std::vector<float> &a, const std::vector<float> &b)
{
    double product = 0, aa = 0, bb = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        product += static_cast<double>(a[i]) * b[i];
        aa += static_cast<double>(a[i]) * a[i];
        bb += static_cast<double>(b[i]) * b[i];
    }
    return product / std::sqrt(aa * bb);
}

} // namespace

int main(int argc, char **argv)
{
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s WEIGHTS TEXT TEXT...\n", argv[0]);
        return 2;
    }
    try {
        const std::vector<std::string> texts(argv + 2, argv + argc);
        const auto embeddings = Embedder(argv[1])(texts);
        for (std::size_t i = 1; i < texts.size(); ++i) {
            std::printf("%.6f %s\n", cosine(embeddings[0], embeddings[i]), texts[i].c_str());
        }
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
