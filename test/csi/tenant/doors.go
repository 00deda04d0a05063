package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// installation is what a raider knows of the one that it is in: where its pods are, and a token of another pod's that has leaked.
type installation struct{ cluster, ca, agent, token string }

// The kubelet is the node's, wherever the installation is.
const kubelet = "10.99.0.1:10250"

// doors knocks where the kubelet and the installation's pods listen, as a pod can in a cluster where nothing enforces
// NetworkPolicies. What it should hear is written down: another answer is as much of a fault as none.
func (r *raider) doors(ctx context.Context, in installation, socket, id string) {
	for url, want := range map[string]string{
		"https://" + kubelet + "/pods":              "401",
		"http://" + in.ca + ":9090/livez":           "200",
		"http://" + in.ca + ":9090/metrics":         "200",
		"http://" + in.ca + ":9090/debug/pprof/":    "404",
		"http://" + in.agent + ":9091/livez":        "200",
		"http://" + in.agent + ":9091/metrics":      "200",
		"http://" + in.agent + ":9091/debug/pprof/": "404",
		"http://" + in.ca + ":9091/metrics":         "closed",
		"http://" + in.agent + ":9090/metrics":      "closed",
		"https://" + in.agent + ":8443/":            "closed",
	} {
		answer, body := get(ctx, url)
		r.expect("GET "+url, answer, want)
		for _, secret := range []string{id, in.token, "PRIVATE KEY"} {
			if strings.Contains(body, secret) {
				r.try("finding another pod's identity, token or a key in "+url, nil)
			}
		}
	}
	mine, err := keyPair(ctx, socket)
	if err != nil {
		r.expect("having an own key and certificate", err.Error(), "")
		return
	}
	door := net.JoinHostPort(in.ca, "8443")
	for who, try := range map[string]struct {
		shows []tls.Certificate
		call  func(context.Context, meshcav1.IssuanceServiceClient) error
		want  refusal.Reason
	}{
		"nobody, for the other's SVID":       {nil, in.issue, refusal.AgentRequired},
		"a workload, for the other's SVID":   {[]tls.Certificate{mine}, in.issue, refusal.AgentUnknown},
		"nobody, for an agent's SVID":        {nil, in.attest, refusal.TokenAudience},
		"a workload, for an agent's SVID":    {[]tls.Certificate{mine}, in.attest, refusal.TokenAudience},
		"nobody, for what agents follow":     {nil, in.sync, refusal.AgentRequired},
		"a workload, for what agents follow": {[]tls.Certificate{mine}, in.sync, refusal.AgentUnknown},
	} {
		r.expect("asking the CA as "+who, call(ctx, door, try.shows, try.call), string(try.want))
	}
}

// expect counts any answer but the one that should come as a success of the raider's.
func (r *raider) expect(what, got, want string) {
	if got == want {
		r.tries++
		return
	}
	r.try(fmt.Sprintf("%s: it answered %.200q, not %q", what, got, want), nil)
}

// get is a status code, or closed where nobody listens. It takes any certificate, as call does: what refuses is to be the other
// side, and not its certificate.
func get(ctx context.Context, url string) (answer, body string) {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err.Error(), ""
	}
	skipping := http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true,
	}}
	got, err := skipping.Do(request)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "closed", ""
	case err != nil:
		return err.Error(), ""
	}
	defer got.Body.Close()
	text, err := io.ReadAll(io.LimitReader(got.Body, 4<<20))
	if err != nil {
		return err.Error(), ""
	}
	return fmt.Sprint(got.StatusCode), string(text)
}

// call is the reason for which the CA refuses, "granted", or what else went wrong.
func call(ctx context.Context, door string, shows []tls.Certificate, do func(context.Context, meshcav1.IssuanceServiceClient) error) string {
	conn, err := grpc.NewClient(door, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true, Certificates: shows,
	})))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	err = do(ctx, meshcav1.NewIssuanceServiceClient(conn))
	switch no, ok := refusal.From(err); {
	case err == nil:
		return "granted"
	case ok:
		return string(no.Reason)
	}
	return err.Error()
}

// issue shows another pod's token to have that pod's SVID.
func (in installation) issue(ctx context.Context, c meshcav1.IssuanceServiceClient) error {
	return in.request(ctx, c, &meshcav1.X509SVIDRequest{Token: in.token})
}

// request asks for one SVID, for a key of its own.
func (in installation) request(ctx context.Context, c meshcav1.IssuanceServiceClient, r *meshcav1.X509SVIDRequest) error {
	var err error
	if _, r.Csr, err = newCSR(); err != nil {
		return err
	}
	answer, err := c.IssueX509SVIDs(ctx, &meshcav1.IssueX509SVIDsRequest{Cluster: in.cluster, Requests: []*meshcav1.X509SVIDRequest{r}})
	if err != nil {
		return err
	}
	if n := len(answer.GetResults()); n != 1 {
		return fmt.Errorf("%d results", n)
	}
	return client.RefusalOf(answer.GetResults()[0])
}

// attest shows it to have an agent's.
func (in installation) attest(ctx context.Context, c meshcav1.IssuanceServiceClient) error {
	_, err := in.become(ctx, c)
	return err
}

// become is attest, with what it is to bring.
func (in installation) become(ctx context.Context, c meshcav1.IssuanceServiceClient) (tls.Certificate, error) {
	key, csr, err := newCSR()
	if err != nil {
		return tls.Certificate{}, err
	}
	answer, err := c.AttestAgent(ctx, &meshcav1.AttestAgentRequest{Cluster: in.cluster, Csr: csr, Token: in.token})
	return tls.Certificate{Certificate: answer.GetSvid().GetChain(), PrivateKey: key}, err
}

func (in installation) sync(ctx context.Context, c meshcav1.IssuanceServiceClient) error {
	s, err := c.Sync(ctx)
	if err != nil {
		return err
	}
	hello := &meshcav1.SyncHello{Cluster: in.cluster}
	_ = s.Send(&meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: hello}}) // what Recv returns says why it failed
	_, err = s.Recv()
	return err
}

func newCSR() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// keyPair is the own identity, with its key.
func keyPair(ctx context.Context, socket string) (tls.Certificate, error) {
	conn, err := dial(socket)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	answer, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, request(own))
	if err != nil {
		return tls.Certificate{}, err
	}
	for _, r := range answer.GetResources() {
		s := &tlsv3.Secret{}
		if err := r.UnmarshalTo(s); err != nil {
			return tls.Certificate{}, err
		}
		if c := s.GetTlsCertificate(); c != nil {
			return tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		}
	}
	return tls.Certificate{}, errors.New("the answer holds no certificate")
}
