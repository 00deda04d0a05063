// Package inbound bounds what strangers can make a server keep before any handler of it has a say: connections, and messages of
// gRPC calls that have begun to arrive and do not end.
package inbound
