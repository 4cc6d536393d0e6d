// One decoder layer: the arithmetic of irq_runtime/reference.py, on rows of any number of sequences.
#include <algorithm>
#include <cmath>

#include "irq/engine.h"
#include "vector_ops.h"
#include "workspace.h"

namespace irq {
namespace {

// Up to few_tokens each token is multiplied as if it were alone, a few rows at a time, which stay in the cache from
// token to token: a text has the same bits whatever is decoded beside it. A gemm is no faster there in fast mode, and
// a third faster in exact mode at eight.
void product(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
             Store store) {
    if (x.tokens() > few_tokens) return gemm(w, x, r0, r1, y, ldy, store);
    if (x.tokens() == 1) return gemv(w, x, 0, r0, r1, y, store);
    for (std::size_t r = r0; r < r1; r += row_tile) {
        const std::size_t end = std::min(r + row_tile, r1);
        for (std::size_t t = 0; t < x.tokens(); ++t) gemv(w, x, t, r, end, y + t * ldy, store);
    }
}

// Whether what follows these products takes less time than threads take to meet: one row, no adapter.
template <class Projection>
bool is_light(std::size_t rows, const Projection *projections, std::size_t count) {
    return rows == 1 && std::none_of(projections, projections + count,
                                     [](const Projection &p) { return p.linear->has_lora(); });
}

void rotate(float *x, std::size_t head_dim, bool interleaved, const float *cosines, const float *sines) {
    const std::size_t half = head_dim / 2;
    const std::size_t step = interleaved ? 2 : 1, distance = interleaved ? 1 : half;
    for (std::size_t i = 0; i < half; ++i) {
        float &first = x[i * step], &second = x[i * step + distance];
        const float a = first, b = second;
        first = a * cosines[i] - b * sines[i];
        second = b * cosines[i] + a * sines[i];
    }
}

}  // namespace

void Engine::embed() {
    Workspace &w = *workspace_;
    pool_.for_each(w.count, [&](std::size_t i, unsigned) {
        const auto token = static_cast<std::size_t>(w.rows[i].token);
        dequantize_rows(model_.embedding(), token, token + 1, &w.x[i * w.hidden]);
        const std::vector<float> &frequencies = model_.frequencies();
        for (std::size_t k = 0; k < frequencies.size(); ++k) {
            const float angle = static_cast<float>(w.rows[i].position) * frequencies[k];
            w.cosines[i * frequencies.size() + k] = static_cast<float>(std::cos(static_cast<double>(angle)));
            w.sines[i * frequencies.size() + k] = static_cast<float>(std::sin(static_cast<double>(angle)));
        }
    });
}

void Engine::prepare(Activations &activations, const float *x, std::size_t columns) {
    activations.reshape(workspace_->count, columns);
    pool_.for_each(workspace_->count,
                   [&](std::size_t i, unsigned) { activations.prepare_token(i, x + i * columns); });
}

// The residual stream, normalised, as input of the next matrices.
void Engine::normalize(const std::vector<float> &weight) {
    Workspace &w = *workspace_;
    const auto eps = static_cast<float>(model_.config().rms_norm_eps);
    w.hidden_input.reshape(w.count, w.hidden);
    pool_.for_each(w.count, [&](std::size_t i, unsigned) {
        float *normed = &w.normed[i * w.hidden];
        vector_ops().rms_norm(&w.x[i * w.hidden], weight.data(), w.hidden, eps, normed);
        w.hidden_input.prepare_token(i, normed);
    });
}

// Matrices that share an input, and the first halves of their adapters, cut into ranges of rows that
// threads take one after the other. The second halves are `add_branch`.
void Engine::multiply(const Activations &x, const Projection *projections, std::size_t count) {
    struct Task {
        const Matrix *matrix;
        float *y;
        std::size_t ldy;
        Store store;
        std::size_t begin;  // number of its first range
    };
    Task tasks[6];
    std::size_t n_tasks = 0, rows = 0, bytes = 0;
    for (std::size_t i = 0; i < count; ++i) {
        rows += projections[i].linear->weight.rows;
        bytes += projections[i].linear->weight.total_bytes();
    }
    // Several ranges a thread even out what threads get done, but each begins with cold memory: a megabyte at least.
    const std::size_t threads = pool_.size(), most = threads * 6;
    const std::size_t wanted = x.tokens() > few_tokens ? most : std::clamp(bytes >> 20, threads, most);
    const std::size_t share = threads == 1 ? rows : rows / wanted;
    const std::size_t chunk = std::max(share / row_tile, std::size_t{1}) * row_tile;
    std::size_t ranges = 0;
    const auto add = [&](const Matrix &matrix, float *y, std::size_t ldy, Store store) {
        tasks[n_tasks++] = {&matrix, y, ldy, store, ranges};
        ranges += (matrix.rows + chunk - 1) / chunk;
    };
    for (std::size_t i = 0; i < count; ++i) {
        const Projection &p = projections[i];
        if (p.linear->has_lora()) add(p.linear->lora_a, p.branch->down.data(), p.linear->lora_a.rows, Store::set);
    }
    for (std::size_t i = 0; i < count; ++i) {
        add(projections[i].linear->weight, projections[i].y, projections[i].ldy, projections[i].store);
    }
    pool_.for_each(ranges, [&](std::size_t range, unsigned) {
        std::size_t t = n_tasks - 1;
        while (tasks[t].begin > range) --t;
        const Task &task = tasks[t];
        const std::size_t r0 = (range - task.begin) * chunk, r1 = std::min(r0 + chunk, task.matrix->rows);
        product(*task.matrix, x, r0, r1, task.y, task.ldy, task.store);
    });
    for (std::size_t i = 0; i < count; ++i) {
        const Projection &p = projections[i];
        if (!p.linear->has_lora()) continue;
        const std::size_t rank = p.linear->lora_a.rows;
        p.branch->input.prepare(p.branch->down.data(), rank, workspace_->count, rank);
    }
}

void Engine::add_branch(const Projection &p, std::size_t begin, std::size_t end) {
    if (p.linear->has_lora()) {
        product(p.linear->lora_b, p.branch->input, begin, end, p.y, p.ldy, Store::add);
    }
    if (p.linear->bias.empty()) return;
    for (std::size_t i = 0; i < workspace_->count; ++i) {
        for (std::size_t r = begin; r < end; ++r) p.y[i * p.ldy + r] += p.linear->bias[r];
    }
}

void Engine::add_to_residual(const Linear &linear, const Activations &x) {
    Workspace &w = *workspace_;
    const Projection p{&linear, w.x.data(), w.hidden, Store::add, &w.branches[0]};
    multiply(x, &p, 1);
    if (!linear.has_lora()) return;
    const std::size_t chunk = (w.hidden / pool_.size() + row_tile) / row_tile * row_tile;
    pool_.for_each((w.hidden + chunk - 1) / chunk, [&](std::size_t i, unsigned) {
        add_branch(p, i * chunk, std::min((i + 1) * chunk, w.hidden));
    });
}

void Engine::attend(const Layer &layer, std::size_t index) {
    Workspace &w = *workspace_;
    const std::size_t q_width = w.heads * w.head_dim, kv_width = w.kv_heads * w.head_dim;
    normalize(layer.attn_norm);
    const Projection projections[] = {{&layer.q, w.q.data(), q_width, Store::set, &w.branches[0]},
                                      {&layer.k, w.k.data(), kv_width, Store::set, &w.branches[1]},
                                      {&layer.v, w.v.data(), kv_width, Store::set, &w.branches[2]}};
    multiply(w.hidden_input, projections, 3);
    const auto finish = [&](std::size_t item, unsigned) {
        if (item < w.heads) {
            finish_head(projections[0], layer.q_norm, item, true);
        } else {
            finish_head(projections[1], layer.k_norm, item - w.heads, true);
            finish_head(projections[2], {}, item - w.heads, false);
            cache_head(index, item - w.heads);
        }
    };
    if (is_light(w.count, projections, 3)) {
        for (std::size_t item = 0; item < w.heads + w.kv_heads; ++item) finish(item, 0);
    } else {
        pool_.for_each(w.heads + w.kv_heads, finish);
    }
    // Heads that share keys go together, unless threads would wait for one another: a row is few groups.
    const std::size_t together = w.count == 1 && pool_.size() > 1 ? 1 : w.heads / w.kv_heads;
    const std::size_t groups = w.heads / together;
    pool_.for_each(w.count * groups, [&](std::size_t item, unsigned thread) {
        attend_heads(index, item / groups, item % groups * together, together, thread);
    });
    prepare(w.head_input, w.attended.data(), q_width);
    add_to_residual(layer.output, w.head_input);
}

// Adapter, bias, norm and rotation of one head of q, k or v, all rows.
void Engine::finish_head(const Projection &p, const std::vector<float> &norm, std::size_t head, bool is_rotated) {
    const Workspace &w = *workspace_;
    const ModelConfig &c = model_.config();
    add_branch(p, head * w.head_dim, (head + 1) * w.head_dim);
    for (std::size_t i = 0; i < w.count; ++i) {
        float *x = p.y + i * p.ldy + head * w.head_dim;
        if (!norm.empty()) {
            vector_ops().rms_norm(x, norm.data(), w.head_dim, static_cast<float>(c.rms_norm_eps), x);
        }
        const std::size_t angles = i * w.head_dim / 2;
        if (is_rotated) rotate(x, w.head_dim, c.interleaved, &w.cosines[angles], &w.sines[angles]);
    }
}

// Stores the finished keys and values of one head, all rows.
void Engine::cache_head(std::size_t layer, std::size_t head) {
    const Workspace &w = *workspace_;
    for (std::size_t i = 0; i < w.count; ++i) {
        const Sequence &s = *w.rows[i].sequence;
        const std::size_t position = w.rows[i].position, from = (i * w.kv_heads + head) * w.head_dim;
        const std::size_t element = s.is_half_ ? 2 : 4, base = (layer * w.kv_heads + head) * s.head_bytes_;
        const std::size_t key = position / lanes * lanes * w.head_dim + position % lanes;
        vector_ops().store(&w.k[from], w.head_dim, s.is_half_, lanes, s.keys_.get() + base + key * element);
        const std::size_t value = position * padded(w.head_dim);
        vector_ops().store(&w.v[from], w.head_dim, s.is_half_, 1, s.values_.get() + base + value * element);
    }
}

// Heads [head, head + count), which share keys.
void Engine::attend_heads(std::size_t layer, std::size_t row, std::size_t head, std::size_t count, unsigned thread) {
    Workspace &w = *workspace_;
    const Sequence &s = *w.rows[row].sequence;
    const std::size_t kv_head = head / (w.heads / w.kv_heads);
    const std::size_t base = (layer * w.kv_heads + kv_head) * s.head_bytes_;
    const HeadCache cache{s.keys_.get() + base, s.values_.get() + base, s.is_half_};
    const std::size_t at = (row * w.heads + head) * w.head_dim;
    vector_ops().attend(&w.q[at], count, cache, w.head_dim, w.rows[row].position + 1,
                        &w.scores[thread * most_queries * padded(options_.context)], &w.attended[at]);
}

void Engine::feed_forward(const Layer &layer) {
    Workspace &w = *workspace_;
    normalize(layer.ffn_norm);
    const Projection projections[] = {{&layer.gate, w.gate.data(), w.inner, Store::set, &w.branches[0]},
                                      {&layer.up, w.up.data(), w.inner, Store::set, &w.branches[1]}};
    multiply(w.hidden_input, projections, 2);
    const std::size_t share = is_light(w.count, projections, 2) ? w.inner : w.inner / pool_.size();
    const std::size_t chunk = (share + row_tile) / row_tile * row_tile;
    pool_.for_each((w.inner + chunk - 1) / chunk, [&](std::size_t range, unsigned) {
        const std::size_t begin = range * chunk, end = std::min(begin + chunk, w.inner);
        for (const Projection &p : projections) add_branch(p, begin, end);
        for (std::size_t i = 0; i < w.count; ++i) {
            vector_ops().swiglu(&w.gate[i * w.inner + begin], &w.up[i * w.inner + begin], end - begin);
        }
    });
    prepare(w.inner_input, w.gate.data(), w.inner);
    add_to_residual(layer.down, w.inner_input);
}

}  // namespace irq
