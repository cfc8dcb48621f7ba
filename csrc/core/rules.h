// The list of rules, and every kind of table by name.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../math/adam.h"
#include "../math/adamw.h"
#include "../math/sgd.h"
#include "schema.h"

namespace trainops {

// Expands macro(Rule, name) for each.
#define TRAINOPS_RULES(macro) macro(AdamW, "adamw") macro(Adam, "adam") macro(SGD, "sgd")

#define TRAINOPS_RULE_SCHEMA(Rule, name) schema_of_rule<Rule>(name),
inline const std::vector<Schema>& rules() {
  static const std::vector<Schema> all{TRAINOPS_RULES(TRAINOPS_RULE_SCHEMA)};
  return all;
}
#undef TRAINOPS_RULE_SCHEMA

// Calls function(Rule{}) with the rule of that name.
template <typename Function>
void with_rule(const std::string& rule, Function function) {
#define TRAINOPS_CASE(Rule, name) \
  if (rule == name) return function(Rule{});
  TRAINOPS_RULES(TRAINOPS_CASE)
#undef TRAINOPS_CASE
  throw std::invalid_argument("there is no rule " + rule);
}

inline const std::vector<Schema>& schemas() {
  static const std::vector<Schema> all = [] {
    std::vector<Schema> every = rules();
    every.push_back({"ema", {TRAINOPS_EMA_COLUMNS(TRAINOPS_COLUMN)}, {}, kEMAAverage});
    every.push_back({"reduce", {{"tensor", kRead}}, {}, 0});
    every.push_back({"transform", {{"tensor", kWritten}}, {}, 0});  // in place: scaling, clamping
    return every;
  }();
  return all;
}

inline const std::vector<Column>& further_averages() {
  static const std::vector<Column> all{TRAINOPS_FURTHER_AVERAGES(TRAINOPS_COLUMN)};
  return all;
}

// A kind of table, of a rule with so many averages.
inline Schema schema_named(std::string_view name, size_t averages = 1) {
  const auto& all = schemas();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Schema& s) { return s.name == name; });
  if (found == all.end()) throw std::invalid_argument("there is no table of that kind: " + std::string(name));
  Schema schema = *found;
  if (averages > 1) {
    const bool of_rule = !schema.settings.empty();
    if (!of_rule || averages > kMaxAverages) throw std::invalid_argument("no table has so many averages");
    const auto& further = further_averages();
    schema.columns.insert(schema.columns.end(), further.begin(), further.begin() + averages - 1);
    schema.averages = averages;
  }
  return schema;
}

}  // namespace trainops
