package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

const (
	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	rootName   = "ROOTCA"
	// maxSecrets bounds an answer: a bundle of many roots and a chain are some ten KiB.
	maxSecrets = 4 << 20
)

// secrets is what an SDS socket serves to a proxy.
type secrets struct {
	chain []*x509.Certificate
	// key is PKCS #8; it is written to a file of mode 0600 and goes nowhere else.
	key crypto.Signer
	// roots of the SVID's own trust domain.
	roots []*x509.Certificate
}

// servedWithin is how long a socket may keep silent: what a workload has is served at once, so one that waits is pending
// or denied, and that may last.
const servedWithin = 5 * time.Second

// fetchSecrets does what Envoy does: it subscribes to the certificate and the roots, and waits for both; for as long as
// the user said, or for servedWithin.
func (c *cli) fetchSecrets(ctx context.Context, socket, name string) (*secrets, error) {
	if !c.timeoutSet {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, servedWithin)
		defer cancel()
	}
	conn, err := grpc.NewClient("passthrough:///sds",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxSecrets)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return nil, sdsFailed(socket, err)
	}
	request := &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "certctl", Cluster: "certctl"}, ResourceNames: []string{name, rootName}, TypeUrl: secretType}
	_ = stream.Send(request) // if it fails, Recv says why
	found := map[string]*tlsv3.Secret{}
	for found[name] == nil || found[rootName] == nil {
		r, err := stream.Recv()
		if err != nil {
			return nil, c.waitingFor(ctx, socket, name, found, err)
		}
		for _, resource := range r.GetResources() {
			s := &tlsv3.Secret{}
			if err := resource.UnmarshalTo(s); err != nil {
				return nil, no(socket+" answers with something that is no TLS secret", err, "")
			}
			found[s.GetName()] = s
		}
		request = &discoveryv3.DiscoveryRequest{ResourceNames: request.GetResourceNames(), TypeUrl: secretType, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()}
		_ = stream.Send(request)
	}
	_ = stream.CloseSend()
	return readSecrets(found[name].GetTlsCertificate(), found[rootName].GetValidationContext())
}

// waitingFor explains why the secrets did not come. The socket is silent for whoever is pending, denied or refused; the
// agent's admin socket knows which it is.
func (c *cli) waitingFor(ctx context.Context, socket, name string, found map[string]*tlsv3.Secret, err error) error {
	if status.Code(err) != codes.DeadlineExceeded && !errors.Is(err, context.DeadlineExceeded) {
		return sdsFailed(socket, err)
	}
	missing := name
	if found[name] != nil {
		missing = rootName
	}
	what := fmt.Sprintf("%s serves no secret %.255q", socket, missing)
	w := c.workloadAt(context.WithoutCancel(ctx), socket)
	if w == nil {
		return no(what+" yet", nil, "`certctl explain --agent` says what its workload was refused for; --timeout waits longer")
	}
	if r := refusalOf(w); r != nil {
		return no(fmt.Sprintf("%s: its workload is %s", what, w.GetState()), fmt.Errorf("%s (%s)", r.GetMessage(), r.GetReason()), strings.TrimSuffix(advice(refusal.Reason(r.GetReason()), identity(w)), "."))
	}
	return no(fmt.Sprintf("%s: its workload is %s", what, w.GetState()), nil, "--timeout waits longer; a name other than default may be one that it does not have")
}

// adminWait bounds the question that follows a failure.
const adminWait = 2 * time.Second

// workloadAt asks the agent, if it can be asked, which workload a socket belongs to; nil where nobody knows.
func (c *cli) workloadAt(ctx context.Context, socket string) *meshcav1.WorkloadStatus {
	ctx, cancel := context.WithTimeout(ctx, adminWait)
	defer cancel()
	s, err := c.agentStatus(ctx)
	if err != nil {
		return nil
	}
	here, err := os.Stat(socket)
	if err != nil {
		return nil
	}
	for _, w := range s.GetWorkloads() {
		if there, err := os.Stat(w.GetSocket()); err == nil && os.SameFile(here, there) {
			return w
		}
	}
	return nil
}

func sdsFailed(socket string, err error) error {
	switch status.Code(err) {
	case codes.Unavailable:
		return &failure{code: exitUnreachable, what: "cannot fetch from " + socket, why: status.Convert(err).Message(),
			next: "It must be a workload's SDS socket that this user may open, and its agent must run"}
	case codes.Unimplemented:
		return no(socket+" is no SDS socket", errors.New(status.Convert(err).Message()), "`certctl status --agent` shows the agent's sockets")
	}
	return no("fetching from "+socket+" failed", errors.New(status.Convert(err).Message()), "")
}

func readSecrets(cert *tlsv3.TlsCertificate, roots *tlsv3.CertificateValidationContext) (*secrets, error) {
	svid, err := x509svid.Parse(cert.GetCertificateChain().GetInlineBytes(), cert.GetPrivateKey().GetInlineBytes())
	if err != nil {
		return nil, no("what the socket serves is no X509-SVID with its key", err, "")
	}
	s := &secrets{chain: svid.Certificates, key: svid.PrivateKey}
	pemRoots, err := rootsOf(roots, svid.ID.TrustDomain().Name())
	if err != nil {
		return nil, no("the roots that the socket serves cannot be read", err, "")
	}
	if s.roots, err = parsePEM(pemRoots); err != nil {
		return nil, no("the roots that the socket serves cannot be read", err, "")
	}
	return s, nil
}

// rootsOf reads a validation context in either of its forms: Envoy's SPIFFE validator, or a plain trusted_ca.
func rootsOf(v *tlsv3.CertificateValidationContext, trustDomain string) ([]byte, error) {
	custom := v.GetCustomValidatorConfig()
	if custom == nil {
		return v.GetTrustedCa().GetInlineBytes(), nil
	}
	config := &tlsv3.SPIFFECertValidatorConfig{}
	if err := custom.GetTypedConfig().UnmarshalTo(config); err != nil {
		return nil, err
	}
	for _, td := range config.GetTrustDomains() {
		if td.GetName() == trustDomain {
			return td.GetTrustBundle().GetInlineBytes(), nil
		}
	}
	return nil, fmt.Errorf("there are none of trust domain %s", trustDomain)
}

func parsePEM(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; {
		block, after := pem.Decode(rest)
		if block == nil {
			return nil, errors.New("it is not PEM throughout")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs, rest = append(certs, cert), bytes.TrimSpace(after)
	}
	if len(certs) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return certs, nil
}
