package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/api/sds"
)

// crowd is how many workloads the node has; crowdWithin is the bound of its emergency.
const (
	crowd       = 500
	crowdWithin = 60 * time.Second
)

// proxy is one stream to a workload's socket, which takes everything and acknowledges it.
type proxy struct {
	socket string

	mu     sync.Mutex
	chain  []*x509.Certificate // leaf first
	roots  []*x509.Certificate
	leaves int // different ones that came
	err    error
}

// follow keeps the stream until ctx ends.
func (p *proxy) follow(ctx context.Context) {
	err := p.stream(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if ctx.Err() == nil {
		p.err = fmt.Errorf("%s: the stream ended: %w", p.socket, err)
	}
}

func (p *proxy) stream(ctx context.Context) error {
	conn, err := grpc.NewClient("unix:"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	s, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	ask := &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: p.socket, Cluster: "crowd"}, TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault, sds.NameRootCA}}
	for {
		if err := s.Send(ask); err != nil {
			return err
		}
		answer, err := s.Recv()
		if err != nil {
			return err
		}
		for _, r := range answer.GetResources() {
			var secret tlsv3.Secret
			if err := r.UnmarshalTo(&secret); err != nil {
				return err
			}
			if err := p.take(&secret); err != nil {
				return err
			}
		}
		ask = &discoveryv3.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: ask.ResourceNames, VersionInfo: answer.GetVersionInfo(), ResponseNonce: answer.GetNonce()}
	}
}

func (p *proxy) take(secret *tlsv3.Secret) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var err error
	if c := secret.GetTlsCertificate(); c != nil {
		before := p.chain
		if p.chain, err = certificates(c.GetCertificateChain().GetInlineBytes()); err == nil && (before == nil || !before[0].Equal(p.chain[0])) {
			p.leaves++
		}
		return err
	}
	var validator tlsv3.SPIFFECertValidatorConfig
	if err := secret.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&validator); err != nil {
		return err
	}
	p.roots, err = certificates(validator.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes())
	return err
}

func certificates(text []byte) (all []*x509.Certificate, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no certificate in %q", text)
	}
	return all, nil
}

// under reports whether what the proxy holds was signed below root.
func (p *proxy) under(root *x509.Certificate) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.chain) > 1 && p.chain[len(p.chain)-1].CheckSignatureFrom(root) == nil
}

// A node of 500 workloads, each with a proxy, when the root is tainted: every SVID is renewed within the bound, none is
// refused, and no proxy holds an SVID under the old root when that leaves the bundle.
func TestEmergencyOnANodeOfFiveHundred(t *testing.T) {
	s := newSite(t, "jwks", 6*time.Hour)
	s.startCA()
	n := s.node("node1")
	ctx, cancel := context.WithCancel(t.Context())
	var streams sync.WaitGroup
	defer func() { cancel(); streams.Wait() }()
	var proxies []*proxy
	for i := range crowd {
		account := fmt.Sprintf("w%d", i)
		_, err := s.kube.CreateServiceAccount(t.Context(), "shop", account)
		check(t, err)
		n.workload(account)
		proxies = append(proxies, &proxy{socket: n.socket(account)})
	}
	n.start()
	for _, p := range proxies {
		streams.Go(func() { p.follow(ctx) })
	}
	old := s.trusted()[0]
	have := func(root *x509.Certificate) (count int) {
		for _, p := range proxies {
			if p.under(root) {
				count++
			}
		}
		return count
	}
	eventually(t, "an SVID for each workload", 2*startLimit, func() bool { return have(old) == crowd })

	begun := time.Now()
	if out, code := s.certctl("--socket", s.file("admin.sock"), "ca", "taint", "root", "--within", crowdWithin.String(), "--yes"); code != 0 {
		t.Fatalf("certctl ca taint root: exit code %d\n%s", code, out)
	}
	var renewed, left time.Duration
	eventually(t, "the tainted root to leave", 3*crowdWithin, func() bool {
		if renewed == 0 && have(old) == 0 {
			renewed = time.Since(begun)
		}
		r, _ := s.rollout()
		if r.GetStep() == "out" {
			left = time.Since(begun)
		}
		return left > 0
	})
	if still := have(old); renewed == 0 && still > 0 {
		t.Errorf("when the old root had left, %d of %d proxies held an SVID under it", still, crowd)
	}
	if left > crowdWithin+5*time.Second {
		t.Errorf("the tainted root was out after %s", left)
	}
	next := s.trusted()
	if len(next) != 1 || next[0].Equal(old) {
		t.Fatalf("%d roots are trusted after it", len(next))
	}
	eventually(t, "the new root alone at every proxy", startLimit, func() bool {
		return !slices.ContainsFunc(proxies, func(p *proxy) bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.roots) != 1 || !p.roots[0].Equal(next[0])
		})
	})
	for _, p := range proxies {
		if !p.under(next[0]) || p.leaves != 2 || p.err != nil {
			t.Errorf("%s: %d SVIDs, under the new root: %t, %v", p.socket, p.leaves, p.under(next[0]), p.err)
		}
	}
	if refused := s.refusals(begun); len(refused) > 0 {
		t.Errorf("%d refusals, the first one: %s", len(refused), refused[0])
	}
	t.Logf("%d SVIDs were renewed %s after the order, and the tainted root was out after %s", crowd, renewed.Round(100*time.Millisecond), left.Round(100*time.Millisecond))
}

// trusted are the roots of the CA's bundle file.
func (s *site) trusted() []*x509.Certificate {
	s.t.Helper()
	bundle, err := spiffebundle.Load(spiffeid.RequireTrustDomainFromString("mesh.test"), s.file("bundle.json"))
	check(s.t, err)
	return bundle.X509Authorities()
}

// refusals are the audit log's lines about something refused since then.
func (s *site) refusals(since time.Time) (lines []string) {
	s.t.Helper()
	data, err := os.ReadFile(s.file("audit.log"))
	check(s.t, err)
	scan := bufio.NewScanner(bytes.NewReader(data))
	for scan.Scan() {
		var line struct {
			Time    time.Time `json:"time"`
			Outcome string    `json:"outcome"`
		}
		check(s.t, json.Unmarshal(scan.Bytes(), &line))
		if line.Time.After(since) && line.Outcome != "" && line.Outcome != "issued" && line.Outcome != "done" {
			lines = append(lines, scan.Text())
		}
	}
	check(s.t, scan.Err())
	return lines
}
