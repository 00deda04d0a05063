package sds

import (
	"strconv"
	"strings"
	"unicode"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/api/refusal"
)

// wire is a stream of either protocol. receive and send may be called at the same time, each by one goroutine.
type wire interface {
	receive() (*request, error)
	// send sends what encode made of an answer.
	send(proto.Message) error
	encode(*answer) proto.Message
}

// request is what a peer said, in either protocol.
type request struct {
	typeURL, nonce, version string
	node                    *corev3.Node
	refused                 *rpcstatus.Status
	// names restates the subscription (SotW) or adds to it (delta).
	names []string
	// unsubscribe takes names away, and initial is what the peer has (delta).
	unsubscribe []string
	initial     map[string]string
}

type sotwStream struct {
	grpc secretv3.SecretDiscoveryService_StreamSecretsServer
}

var _ wire = sotwStream{}

func (w sotwStream) receive() (*request, error) {
	r, err := w.grpc.Recv()
	if err != nil {
		return nil, err
	}
	return requestOf(r), nil
}

func (w sotwStream) send(m proto.Message) error { return w.grpc.SendMsg(m) }

func (sotwStream) encode(a *answer) proto.Message { return responseOf(a) }

// requestOf reads a SotW or fetch request.
func requestOf(r *discoveryv3.DiscoveryRequest) *request {
	return &request{
		typeURL: r.GetTypeUrl(), nonce: r.GetResponseNonce(), version: r.GetVersionInfo(),
		node: r.GetNode(), refused: r.GetErrorDetail(), names: r.GetResourceNames(),
	}
}

func responseOf(a *answer) *discoveryv3.DiscoveryResponse {
	r := &discoveryv3.DiscoveryResponse{VersionInfo: a.version, TypeUrl: TypeURL, Nonce: nonceString(a.nonce)}
	r.Resources = make([]*anypb.Any, len(a.resources))
	for i, resource := range a.resources {
		r.Resources[i] = resource.GetResource()
	}
	return r
}

type deltaStream struct {
	grpc secretv3.SecretDiscoveryService_DeltaSecretsServer
}

var _ wire = deltaStream{}

func (w deltaStream) receive() (*request, error) {
	r, err := w.grpc.Recv()
	if err != nil {
		return nil, err
	}
	return deltaRequestOf(r), nil
}

// deltaRequestOf reads a delta request.
func deltaRequestOf(r *discoveryv3.DeltaDiscoveryRequest) *request {
	return &request{
		typeURL: r.GetTypeUrl(), nonce: r.GetResponseNonce(), node: r.GetNode(), refused: r.GetErrorDetail(),
		names: r.GetResourceNamesSubscribe(), unsubscribe: r.GetResourceNamesUnsubscribe(),
		initial: r.GetInitialResourceVersions(),
	}
}

func (w deltaStream) send(m proto.Message) error { return w.grpc.SendMsg(m) }

func (deltaStream) encode(a *answer) proto.Message {
	return &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: a.version, TypeUrl: TypeURL, Nonce: nonceString(a.nonce),
		Resources: a.resources, RemovedResources: a.removed,
	}
}

// nonceString writes a nonce: answers of a stream are numbered from 1, and zero is none.
func nonceString(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

// nonceOf reads a nonce that a peer gives back; zero if it is none of the first last.
func nonceOf(s string, last uint64) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > last || nonceString(n) != s {
		return 0
	}
	return n
}

// checkType lets an empty type URL through: on a service that has one type it says nothing.
func checkType(url string) error {
	if url == "" || url == TypeURL {
		return nil
	}
	return refusal.New(refusal.TypeURLUnknown, "the type URL is %q, and only %s is served", clip(url, 256), TypeURL).On("type_url")
}

// disableSPIFFE is the node metadata with which a proxy asks for plain validation contexts, as SPIRE reads it.
const disableSPIFFE = "disable_spiffe_cert_validation"

// asksPlain reads that key: a boolean, or the string "true".
func asksPlain(n *corev3.Node) bool {
	v := n.GetMetadata().GetFields()[disableSPIFFE]
	return v.GetBoolValue() || strings.EqualFold(v.GetStringValue(), "true")
}

// clip makes what a peer wrote fit for a line of a log: no control characters, at most size bytes.
func clip(s string, size int) string {
	if len(s) > size {
		s = s[:size]
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, s)
}

// nackDetail is what a peer says against an answer. A proxy may quote the secret that it refuses, so the text ends
// where a key would begin.
func nackDetail(s string) string {
	for _, mark := range []string{"-----BEGIN", "PRIVATE KEY", "private_key", "inline_bytes", "inline_string"} {
		if at := strings.Index(s, mark); at >= 0 {
			s = s[:at] + "(the rest quotes the secret and is withheld)"
		}
	}
	return clip(s, maxDetail)
}
