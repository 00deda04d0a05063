package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/api/admin"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
)

var td = spiffeid.RequireTrustDomainFromString("mesh.example")

// facts are the small world that a script asks about. Times lie half a minute off the minute, so that what is relative
// reads the same for as long as a script runs.
type facts struct {
	start               time.Time
	authority, stranger issuer
	svid                *x509svid.SVID
	expired             []*x509.Certificate
	website             *x509.Certificate
	bundle              *spiffebundle.Bundle
	secrets, ended      *sds.Secrets
	// rootsAlone is what a socket serves whose workload is denied.
	rootsAlone *sds.Secrets

	mu      sync.Mutex
	lines   []string
	denials map[string]ca.Denial
}

type issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newFacts() (*facts, error) {
	f := &facts{start: time.Now().Truncate(time.Second), denials: map[string]ca.Denial{}}
	var err error
	if f.authority, err = f.root("Mesh Root"); err != nil {
		return nil, err
	}
	if f.stranger, err = f.root("Somebody Else"); err != nil {
		return nil, err
	}
	mid, err := f.issue(f.authority, &x509.Certificate{
		Subject: pkix.Name{CommonName: "Mesh Intermediate"}, URIs: []*url.URL{td.ID().URL()}, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: f.at(-time.Hour), NotAfter: f.at(71 * time.Hour),
	})
	if err != nil {
		return nil, err
	}
	leaf, err := f.issue(mid, f.leaf(6*time.Hour))
	if err != nil {
		return nil, err
	}
	old, err := f.issue(mid, f.leaf(-time.Hour))
	if err != nil {
		return nil, err
	}
	site, err := f.issue(f.stranger, &x509.Certificate{
		Subject: pkix.Name{CommonName: "www.example.com"}, DNSNames: []string{"www.example.com"}, KeyUsage: x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, NotBefore: f.at(-time.Hour), NotAfter: f.at(90 * 24 * time.Hour),
	})
	if err != nil {
		return nil, err
	}
	f.expired, f.website = []*x509.Certificate{old.cert, mid.cert}, site.cert
	f.svid = &x509svid.SVID{ID: spiffeid.RequireFromPath(td, "/ns/shop/sa/cart"), Certificates: []*x509.Certificate{leaf.cert, mid.cert}, PrivateKey: leaf.key}
	f.bundle = spiffebundle.FromX509Authorities(td, []*x509.Certificate{f.authority.cert})
	f.bundle.SetSequenceNumber(3)
	if f.secrets, err = sds.NewSecrets(sds.SecretsConfig{SVIDs: []*x509svid.SVID{f.svid}, Bundles: []*spiffebundle.Bundle{f.bundle}}); err != nil {
		return nil, err
	}
	if f.rootsAlone, err = sds.NewSecrets(sds.SecretsConfig{Bundles: []*spiffebundle.Bundle{f.bundle}}); err != nil {
		return nil, err
	}
	past := &x509svid.SVID{ID: f.svid.ID, Certificates: f.expired, PrivateKey: old.key}
	f.ended, err = sds.NewSecrets(sds.SecretsConfig{SVIDs: []*x509svid.SVID{past}, Bundles: []*spiffebundle.Bundle{f.bundle}})
	return f, err
}

// at is a moment from the start, half a minute farther away than said.
func (f *facts) at(d time.Duration) time.Time {
	if d < 0 {
		return f.start.Add(d - 30*time.Second)
	}
	return f.start.Add(d + 30*time.Second)
}

func (f *facts) stamp(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(f.at(d)) }

func (f *facts) root(name string) (issuer, error) {
	return f.issue(issuer{}, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: f.at(-100 * 24 * time.Hour), NotAfter: f.at(3550 * 24 * time.Hour),
	})
}

func (f *facts) leaf(ends time.Duration) *x509.Certificate {
	return &x509.Certificate{
		URIs: []*url.URL{spiffeid.RequireFromPath(td, "/ns/shop/sa/cart").URL()}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, NotBefore: f.at(min(-2*time.Hour, ends-6*time.Hour)), NotAfter: f.at(ends),
	}
}

// issue signs by the issuer, or by the new key itself where there is none.
func (f *facts) issue(by issuer, t *x509.Certificate) (issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return issuer{}, err
	}
	serial := make([]byte, 16)
	_, _ = rand.Read(serial)
	serial[0] = 0x5a
	t.SerialNumber = new(big.Int).SetBytes(serial)
	if by.cert == nil {
		by = issuer{t, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, by.cert, key.Public(), by.key)
	if err != nil {
		return issuer{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return issuer{cert, key}, err
}

func (f *facts) audit(_ context.Context, verb, peer string, attrs ...slog.Attr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines = append(f.lines, fmt.Sprint(verb, " ", peer, " ", attrs))
}

func (f *facts) audited() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.lines, "\n")
}

// caServer is the real admin server, on stand-ins that are f's methods, and the authorities given.
func (f *facts) caServer(x *roots) (*admin.Server, error) {
	orders, err := registration.OpenOrders(context.Background(), f, f.ScanLiving)
	if err != nil {
		return nil, err
	}
	rules, err := policy.Parse([]byte("rules: [{name: no-system, namespaces: [kube-*], deny: system pods have no business here}, {name: shop, namespaces: [shop], ttl: 1h}]"),
		policy.PolicyContext{TrustDomain: td, Clusters: []policy.Cluster{{Name: "prod"}}})
	if err != nil {
		return nil, err
	}
	status := func(ctx context.Context) (*meshcav1.GetStatusResponse, error) {
		s, err := f.status(ctx)
		if x.upstreamErr != nil {
			s.Degraded = []string{"the upstream is away: " + x.upstreamErr.Error()}
		}
		return s, err
	}
	return admin.New(admin.Config{
		TrustDomain: td, Status: status, Bundle: x.Bundle, Authorities: x, Roots: x, Agents: x.Agents,
		Ledger: f, Decisions: f, Orders: orders, Policy: func() admin.Policy { return rules }, Clusters: map[string]admin.Attestor{"prod": f},
		Connected: func() int { return 1 }, Backup: f.backup, Continuity: x, MaxLife: 6 * time.Hour, Audit: f.audit, Log: quiet(),
	})
}

func (f *facts) status(context.Context) (*meshcav1.GetStatusResponse, error) {
	return &meshcav1.GetStatusResponse{
		Version: "v1.2.3", TrustDomain: "mesh.example", StartedAt: f.stamp(-26 * time.Hour), ServerTime: timestamppb.Now(), Ready: true, BundleSequence: 3,
		MaxSvidTtl: durationpb.New(2 * time.Hour),
		Authorities: []*meshcav1.AuthorityStatus{
			{Kind: "root", State: "trusted", Subject: "CN=Mesh Root", Serial: "01", NotBefore: f.stamp(-100 * 24 * time.Hour), NotAfter: f.stamp(3550 * 24 * time.Hour)},
			{Kind: "intermediate", State: "signing", Subject: "CN=Mesh Intermediate", Serial: "02", NotBefore: f.stamp(-time.Hour), NotAfter: f.stamp(71 * time.Hour), RenewAt: f.stamp(35 * time.Hour)},
		},
		Clusters: []*meshcav1.ClusterStatus{
			{Name: "prod", Mode: "jwks", Liveness: "api", Healthy: true, Issuer: "https://prod.example", KeyIds: []string{"k1", "k2"}, ClockSkew: durationpb.New(1200 * time.Millisecond),
				Signers: []*meshcav1.SignerStatus{
					{Api: "podcertificaterequests", Version: "v1beta1", State: "serving", Pending: 2},
					{Api: "certificatesigningrequests", State: "forbidden", Why: "the CA's account may not sign signers mesh.example/x"},
				},
				Published: []*meshcav1.PublicationStatus{
					{Name: "prod/clustertrustbundle/mesh.example:x:bundle", NotServed: true, Fault: "the cluster does not serve it"},
					{Name: "prod/configmap/meshca/meshca-trust", Sequence: 3, Since: f.stamp(-time.Hour)},
					{Name: "prod/configmap/team-a/istio-ca-root-cert", Apart: true, Fault: "it is somebody else's"},
				}},
			{Name: "lab", Mode: "tokenReview", Liveness: "api", LastError: "dial tcp 10.0.0.9:6443: connect: connection refused"},
		},
		Policy: &meshcav1.PolicyStatus{File: "/etc/meshca/policy.yaml", Rules: 2, LoadedAt: f.stamp(-26 * time.Hour)},
		Agents: []*meshcav1.AgentInfo{
			{SpiffeId: "spiffe://mesh.example/meshca/agent/prod/n1", Cluster: "prod", Node: "n1", Version: "v1.2.3", LastSeen: f.stamp(-time.Hour), AckedBundleSequence: 3, Connected: true},
			{SpiffeId: "spiffe://mesh.example/meshca/agent/prod/n2", Cluster: "prod", Node: "n2", Version: "v1.2.2", LastSeen: f.stamp(-2 * time.Hour), AckedBundleSequence: 2},
		},
		Issued: 1234, Refused: 5, Ended: 7, Store: "bolt /var/lib/meshca/meshca.db", LedgerEntries: 5678,
	}, nil
}

// ScanLedger is newest first.
func (f *facts) ScanLedger(_ context.Context, fn func(ca.LedgerEntry) (bool, error)) error {
	e := func(i uint64, ns, sa, pod string, issued, life time.Duration) ca.LedgerEntry {
		js, _ := json.Marshal(registration.LedgerEvidence{Method: "kubernetes/jwks", Door: "grpc", Cluster: "prod", Namespace: ns, ServiceAccount: sa, Pod: pod, Node: "n1", Rule: "shop"})
		return ca.LedgerEntry{
			Index: i, Serial: []byte{0xab, byte(i)}, ID: "spiffe://mesh.example/ns/" + ns + "/sa/" + sa, Profile: "workload",
			IssuedAt: f.at(-issued), NotAfter: f.at(life - issued), AuthorityKeyID: []byte{1, 2}, TBSDigest: []byte{3}, Evidence: js,
		}
	}
	agent := ca.LedgerEntry{Index: 0, Serial: []byte{0xab, 0}, ID: "spiffe://mesh.example/meshca/agent/prod/n1", Profile: "agent", IssuedAt: f.at(-5 * time.Hour), NotAfter: f.at(time.Hour)}
	for _, entry := range []ca.LedgerEntry{
		e(4, "shop", "cart", "cart-7c5", time.Hour, 6*time.Hour),
		e(3, "shop", "till", "till-9f2", 2*time.Hour, 3*time.Hour),
		e(2, "shop", "cart", "cart-old", 4*time.Hour, 6*time.Hour),
		e(1, "shop", "till", "till-old", 5*time.Hour, time.Hour),
		agent,
	} {
		if more, err := fn(entry); err != nil || !more {
			return err
		}
	}
	return nil
}

func (f *facts) ScanLiving(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error {
	return f.ScanLedger(ctx, func(e ca.LedgerEntry) (bool, error) {
		if !e.NotAfter.After(at) {
			return true, nil
		}
		return fn(e)
	})
}

// ByID and ByPod know of one pod; its name on node n9 tries to move the cursor.
func (f *facts) ByID(id string, n int) []registration.Decision {
	if id != "spiffe://mesh.example/ns/shop/sa/cart" {
		return nil
	}
	return f.decisions()[:min(n, 2)]
}

func (f *facts) ByPod(ns, name string, n int) []registration.Decision {
	if ns == "shop" && name == "cart-old" {
		return f.gonePod()
	}
	if ns != "shop" || name != "cart-7c5" {
		return nil
	}
	return f.decisions()[:min(n, 2)]
}

func (f *facts) Since() time.Time { return f.at(-25 * time.Hour) }

// gonePod is what became of a pod that is gone.
func (f *facts) gonePod() []registration.Decision {
	d := f.decisions()[1]
	d.Time, d.Event, d.Door, d.Rule, d.Outcome, d.Message = f.at(-time.Hour), "end", "", "", "POD_GONE", "pod shop/cart-old does not exist"
	d.Evidence.PodName = "cart-old"
	return []registration.Decision{d}
}

func (f *facts) decisions() []registration.Decision {
	who, _ := attestor.NewIdentity("prod", "shop", "cart")
	agent := registration.Caller{Address: "10.0.0.1:5", ID: spiffeid.RequireFromPath(td, "/meshca/agent/prod/n1")}
	evidence := attestor.Evidence{Proven: true, Identity: who, Method: "kubernetes/jwks", PodName: "cart-7c5", PodUID: "u1", NodeName: "n9\x1b[2J", NodeUID: "u2", CredentialID: "jti"}
	good := evidence
	good.NodeName = "n1"
	return []registration.Decision{
		{Time: f.at(-time.Hour), Event: "issue", Door: "grpc", Caller: agent, Cluster: "prod", Evidence: evidence, Outcome: "POD_NOT_ON_NODE",
			Message: "pod shop/cart-7c5 runs on node n9, the agent asks from node n1", Claim: "kubernetes.io.node.uid"},
		{Time: f.at(-2 * time.Hour), Event: "issue", Door: "grpc", Caller: agent, Cluster: "prod", Evidence: good, ID: f.svid.ID, Rule: "shop", Outcome: "issued", Serial: "ab02", NotAfter: f.at(4 * time.Hour)},
	}
}

// Attest knows one token.
func (f *facts) Attest(_ context.Context, token attestor.Token, _ string) (attestor.Evidence, error) {
	if token.Secret() != "eyGood" {
		return attestor.Evidence{}, refusal.New(refusal.TokenAudience, "the token is for [api], not for meshca").On("aud")
	}
	who, err := attestor.NewIdentity("prod", "shop", "cart")
	return attestor.Evidence{Proven: true, Identity: who}, err
}

// The rest is registration.OrderStore.

func (f *facts) PutDenial(_ context.Context, d ca.Denial) error {
	f.denials[d.ID] = d
	return nil
}

func (f *facts) DeleteDenial(_ context.Context, id string) (bool, error) {
	_, was := f.denials[id]
	delete(f.denials, id)
	return was, nil
}
func (f *facts) Denials(context.Context) ([]ca.Denial, error)          { return nil, nil }
func (f *facts) SetRenewOrders(context.Context, []ca.RenewOrder) error { return nil }
func (f *facts) RenewOrders(context.Context) ([]ca.RenewOrder, error)  { return nil, nil }

// agentServer answers as an agent does; certctl sees it through the wire alone.
type agentServer struct {
	meshcav1.UnimplementedAgentAdminServiceServer
	facts *facts
	// workloads replace the usual ones where there are any.
	workloads []*meshcav1.WorkloadStatus
}

func (a *agentServer) GetAgentStatus(context.Context, *meshcav1.GetAgentStatusRequest) (*meshcav1.GetAgentStatusResponse, error) {
	f := a.facts
	if a.workloads != nil {
		return &meshcav1.GetAgentStatusResponse{TrustDomain: "mesh.example", Connected: true, Workloads: a.workloads}, nil
	}
	held := func(id, serial string, left time.Duration, rotations uint64) *meshcav1.HeldSVID {
		return &meshcav1.HeldSVID{SpiffeId: id, Serial: serial, NotAfter: f.stamp(left), Remaining: durationpb.New(left), Life: durationpb.New(6 * time.Hour), RenewAt: f.stamp(left - 2*time.Hour), Rotations: rotations}
	}
	return &meshcav1.GetAgentStatusResponse{
		Version: "v1.2.3", TrustDomain: "mesh.example", Cluster: "prod", Server: "ca.mesh:8443", StartedAt: f.stamp(-30 * time.Hour), AgentTime: timestamppb.Now(), Ready: true,
		Self: held("spiffe://mesh.example/meshca/agent/prod/n1", "5a01", 5*time.Hour, 7), Connected: true, LastError: "connection reset", LastErrorAt: f.stamp(-3 * time.Hour),
		BundleSequence: 2, ClockSkew: durationpb.New(-300 * time.Millisecond),
		Workloads: []*meshcav1.WorkloadStatus{
			{Socket: "/run/w/cart.sock", TokenFile: "/var/t/cart", State: "fresh", Svid: held("spiffe://mesh.example/ns/shop/sa/cart", "ab04", 5*time.Hour, 3), OpenStreams: 2},
			{Socket: "/run/w/till.sock", TokenFile: "/var/t/till", State: "stale", Svid: held("spiffe://mesh.example/ns/shop/sa/till", "ab03", time.Hour, 1), OpenStreams: 1,
				LastRefusal: &meshcav1.Refusal{Code: 16, Reason: "TOKEN_EXPIRED", Message: "it ended an hour ago"}, LastRefusalAt: f.stamp(-2 * time.Hour), NextTry: f.stamp(2 * time.Hour)},
			{Socket: "/run/w/new.sock", TokenFile: "/var/t/new", State: "pending", Nacks: 1, LastNack: "Envoy did not like it"},
		},
		Deliveries: []*meshcav1.DeliveryStatus{
			{Name: "files in /etc/cart/tls", WrittenAt: f.stamp(-time.Hour), BundleSequence: 2, After: "signal HUP to nginx", AfterAt: f.stamp(-time.Hour)},
			{Name: "files in /etc/till/tls", After: "run /bin/reload", Failures: 3, Fault: "the disk is full"},
		},
	}, nil
}

// troubled are a denied workload, of which the agent knows what the CA told it, one that knows less, and two that are
// well, of which the proxies of one had a trouble that is over, and those of the other ask for what is not there.
func (f *facts) troubled(denied string) []*meshcav1.WorkloadStatus {
	const cart = "spiffe://mesh.example/ns/shop/sa/cart"
	fresh := func(id string) *meshcav1.HeldSVID {
		return &meshcav1.HeldSVID{SpiffeId: id, Serial: "ab09", NotAfter: f.stamp(5 * time.Hour), Remaining: durationpb.New(5 * time.Hour), Life: durationpb.New(6 * time.Hour), RenewAt: f.stamp(3 * time.Hour)}
	}
	return []*meshcav1.WorkloadStatus{
		{Socket: denied, TokenFile: "/var/t/cart", State: "denied", LastSpiffeId: cart, LastRefusalAt: f.stamp(-time.Hour), NextTry: f.stamp(2 * time.Hour),
			LastRefusal: &meshcav1.Refusal{Code: 7, Reason: "IDENTITY_DENIED", Message: cart + " was denied at 14:00 by uid 0: key leaked"}},
		{Socket: "/run/w/late.sock", TokenFile: "/var/t/late", State: "denied", LastSpiffeId: "spiffe://mesh.example/ns/shop/sa/late",
			LastRefusal: &meshcav1.Refusal{Code: 14, Reason: "CA_UNREACHABLE", Message: "no route"}},
		{Socket: "/run/w/past.sock", TokenFile: "/var/t/past", State: "fresh", Svid: fresh("spiffe://mesh.example/ns/shop/sa/past"), Nacks: 2, OpenStreams: 1},
		{Socket: "/run/w/vain.sock", TokenFile: "/var/t/vain", State: "fresh", Svid: fresh("spiffe://mesh.example/ns/shop/sa/vain"), OpenStreams: 1, AwaitedStreams: 2,
			UnknownNames: []string{"edge-cert", "x"}, UnknownCount: 3},
		{Socket: "/run/w/many.sock", TokenFile: "/var/t/many", State: "fresh", Svid: fresh("spiffe://mesh.example/ns/shop/sa/many"), OpenStreams: 32, Limited: 5,
			LastLimit: "PEER_LIMIT: the peer has 32 SDS streams open (limit: StreamsPerPeer)", LastLimitAt: f.stamp(-time.Hour)},
	}
}

func (a *agentServer) CheckAgent(context.Context, *meshcav1.CheckAgentRequest) (*meshcav1.CheckAgentResponse, error) {
	return &meshcav1.CheckAgentResponse{Findings: []*meshcav1.Finding{
		{Subject: "CA", Level: meshcav1.Finding_LEVEL_OK, Detail: "connected to ca.mesh:8443"},
		{Subject: "/run/w/till.sock", Level: meshcav1.Finding_LEVEL_WARNING, Detail: "its renewal fails: TOKEN_EXPIRED", Hint: "Look at the kubelet."},
	}}, nil
}

func (a *agentServer) GetAgentBundle(context.Context, *meshcav1.GetAgentBundleRequest) (*meshcav1.GetAgentBundleResponse, error) {
	b, err := a.facts.bundle.Marshal()
	return &meshcav1.GetAgentBundleResponse{Bundle: b}, err
}
