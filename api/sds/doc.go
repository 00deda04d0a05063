// Package sds serves TLS secrets to proxies over Envoy's Secret Discovery Service v3, in its three forms:
// state-of-the-world (SotW) streams, delta streams, and fetch.
//
// The engine knows nothing of agents or of the CA. A [Source], found for each stream by who is at its other end, gives
// the [Secrets] of now and a channel that closes when they are stale; every stream sends what its peer asked for and
// does not have yet. Secrets are immutable and encoded once; all streams of a source share them.
//
// The names that can be asked for are those of SPIRE and of Istio:
//
//	default              the first identity's certificate and key
//	spiffe://td/path     that identity's certificate and key
//	ROOTCA               the validation context of the own trust domain
//	spiffe://td          the validation context of that trust domain
//	ALL                  one validation context for all trust domains
//	file-cert:CERT~KEY   a certificate and key that the proxy reads from its own files
//	file-root:PATH       a validation context that the proxy reads from its own file
//	file-root:system     the proxy's system bundle
//
// A request without names, or with "*", asks for every identity and every trust domain under their own names.
//
// The rules of the streams are those of the xDS protocol (https://www.envoyproxy.io/docs/envoy/v1.40.0/api-docs/xds_protocol).
package sds
