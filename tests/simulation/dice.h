// Dice: what a seed decides.
#pragma once

#include <cstdint>
#include <random>

namespace varve::simulation {

using Random = std::mt19937_64;

class Dice {
  public:
    explicit Dice(uint64_t seed) : random_(seed) {}

    /// Dice that `seed` and `step` give, whatever was drawn before.
    static Dice Of(uint64_t seed, uint64_t step) {
        return Dice(seed * 0x9e3779b97f4a7c15U ^ step * 0xbf58476d1ce4e5b9U);
    }

    /// At least 0, less than `below`, which is not 0.
    uint64_t Draw(uint64_t below) { return random_() % below; }
    bool Chance(double probability) {
        return std::uniform_real_distribution<double>(0, 1)(random_) < probability;
    }
    Random& random() { return random_; }

  private:
    Random random_;
};

}  // namespace varve::simulation
