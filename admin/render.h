// Results as text for people: tables and aligned lists.
// Not the --json output, and no contract: scripts use --json.
#pragma once

#include <boost/json/value.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace varve::admin {

/// Columns aligned, each as wide as its widest cell; the first row is the heading. Columns whose
/// heading starts with '>' are aligned right.
std::string RenderTable(const std::vector<std::vector<std::string>>& rows);

/// The result of a method as the command line prints it. Keys that are missing show as "-", so
/// that a newer command line can talk to an older server.
std::string RenderDisks(const boost::json::value& result);
std::string RenderSnapshots(const boost::json::value& result);
std::string RenderDifference(const boost::json::value& result);
std::string RenderDisk(const boost::json::value& result);
std::string RenderSnapshot(const boost::json::value& result);
std::string RenderClients(const boost::json::value& result);
std::string RenderStatus(const boost::json::value& result);
std::string RenderCheck(const boost::json::value& result);
std::string RenderScrub(const boost::json::value& result);

/// One line of a text from outside: control characters become '?'.
std::string OneLine(std::string_view text);

}  // namespace varve::admin
