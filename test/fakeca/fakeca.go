// Package fakeca is a CA for tests of whoever calls one: a real gRPC server with TLS that implements
// meshca.v1.IssuanceService, knows tokens by a table, and holds its callers to the contract. What breaks the contract
// is refused and written down: see CA.Violations.
package fakeca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/rotation"
)

// State is what Sync streams are sent.
type State struct {
	Denied []string
	Renew  []*meshcav1.RenewOrder
	Ended  []*meshcav1.Ending
	// Reviewed is when the policy was last held against what lives.
	Reviewed *timestamppb.Timestamp
}

// CA is the fake. Its methods are safe for concurrent use.
type CA struct {
	domain  spiffeid.TrustDomain
	cluster string
	state   rotation.Current[State]
	bundle  *rotation.Current[*spiffebundle.Bundle]

	mu        sync.Mutex
	root      *authority
	serverID  spiffeid.ID
	ttl       time.Duration // of workloads' SVIDs
	agentTTL  time.Duration
	skew      time.Duration // our clock minus the true one
	agents    map[string]spiffeid.ID
	workloads map[string]spiffeid.ID
	pods      map[string]spiffeid.ID // by UID
	refuse    func(id spiffeid.ID) error
	callers   func(svid *x509.Certificate) error
	keys      map[string]bool
	seen      Seen
	server    *grpc.Server
	address   string
}

// Seen is what callers did.
type Seen struct {
	// Violations of the contract, a sentence each.
	Violations []string
	// Batches has the size of each call for workloads' SVIDs; Attests counts those for agents'.
	Batches []int
	Attests int
	// Issued counts SVIDs by ID.
	Issued map[spiffeid.ID]int
	// Hellos and Acks are what came over Sync.
	Hellos []*meshcav1.SyncHello
	Acks   []uint64
	// Streams are the Sync streams that are open.
	Streams int
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// New makes a CA with a root, for a cluster called "test". SVIDs last an hour.
func New(domain string) (*CA, error) {
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil {
		return nil, err
	}
	root, err := newRoot(td)
	if err != nil {
		return nil, err
	}
	b := spiffebundle.FromX509Authorities(td, []*x509.Certificate{root.cert})
	b.SetSequenceNumber(1)
	return &CA{
		domain: td, cluster: "test", root: root, bundle: rotation.NewCurrent(b), ttl: time.Hour, agentTTL: time.Hour,
		serverID: spiffeid.RequireFromPath(td, "/meshca/server"),
		agents:   map[string]spiffeid.ID{}, workloads: map[string]spiffeid.ID{}, pods: map[string]spiffeid.ID{}, keys: map[string]bool{},
		seen: Seen{Issued: map[spiffeid.ID]int{}},
	}, nil
}

// Anew is the CA that is made in the place of this one, which has stopped: another root, no memory, and a bundle whose sequence
// begins beyond. The cluster, whose tokens and pods it knows, is the same.
func (c *CA) Anew() (*CA, error) {
	anew, err := New(c.domain.Name())
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	sequence, _ := c.bundle.Value().SequenceNumber()
	b := spiffebundle.FromX509Authorities(c.domain, []*x509.Certificate{anew.root.cert})
	b.SetSequenceNumber(sequence + 1000)
	anew.bundle.Set(b)
	anew.address, anew.ttl, anew.agentTTL = c.address, c.ttl, c.agentTTL
	anew.agents, anew.workloads, anew.pods = maps.Clone(c.agents), maps.Clone(c.workloads), maps.Clone(c.pods)
	return anew, nil
}

// Agent makes a token prove an agent on a node.
func (c *CA) Agent(token, node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.agents[token] = spiffeid.RequireFromPath(c.domain, "/meshca/agent/"+c.cluster+"/"+node)
}

// ForgetAgents makes no token prove an agent, and no agent's SVID open the door.
func (c *CA) ForgetAgents() { c.with(func() { clear(c.agents) }) }

// Workload makes a token prove a workload.
func (c *CA) Workload(token, path string) spiffeid.ID {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := spiffeid.RequireFromPath(c.domain, path)
	c.workloads[token] = id
	return id
}

// Pod makes an agent's word prove a workload, by the UID of its pod.
func (c *CA) Pod(uid, path string) spiffeid.ID {
	id := spiffeid.RequireFromPath(c.domain, path)
	c.with(func() { c.pods[uid] = id })
	return id
}

// Refuse makes f decide about each issuance, agents' too; nil: yes to all.
func (c *CA) Refuse(f func(id spiffeid.ID) error) { c.with(func() { c.refuse = f }) }

// RefuseCallers makes f decide about each agent's SVID that a call or a stream comes with; nil: yes to all.
func (c *CA) RefuseCallers(f func(svid *x509.Certificate) error) { c.with(func() { c.callers = f }) }

// Lives sets the lives of workloads' and of agents' SVIDs.
func (c *CA) Lives(workloads, agents time.Duration) {
	c.with(func() { c.ttl, c.agentTTL = workloads, agents })
}

// Skew sets the CA's clock off.
func (c *CA) Skew(d time.Duration) { c.with(func() { c.skew = d }) }

// PoseAs makes the server show another identity than the CA's.
func (c *CA) PoseAs(path string) {
	c.with(func() { c.serverID = spiffeid.RequireFromPath(c.domain, path) })
}

// Order sets what Sync streams are sent.
func (c *CA) Order(s State) { c.state.Set(s) }

// AddRoot puts a further root into the bundle, under a new sequence.
func (c *CA) AddRoot() error {
	root, err := newRoot(c.domain)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	held := c.bundle.Value()
	c.setBundle(append(held.X509Authorities(), root.cert)...)
	return nil
}

// ReplaceRoot makes another root the only one, at once, as no CA ever should: it is how a node finds the world that was
// off for long.
func (c *CA) ReplaceRoot() error {
	root, err := newRoot(c.domain)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.root = root
	c.setBundle(root.cert)
	return nil
}

func (c *CA) setBundle(roots ...*x509.Certificate) {
	sequence, _ := c.bundle.Value().SequenceNumber()
	b := spiffebundle.FromX509Authorities(c.domain, roots)
	b.SetSequenceNumber(sequence + 1)
	c.bundle.Set(b)
}

// Bundle is the trust bundle in SPIFFE JSON.
func (c *CA) Bundle() []byte {
	encoded, err := c.bundle.Value().Marshal()
	if err != nil {
		panic(err)
	}
	return encoded
}

// Roots are those of the bundle.
func (c *CA) Roots() []*x509.Certificate { return c.bundle.Value().X509Authorities() }

// Domain is the trust domain.
func (c *CA) Domain() spiffeid.TrustDomain { return c.domain }

// Seen returns what callers did so far.
func (c *CA) Seen() Seen {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.seen
	s.Violations = append([]string(nil), s.Violations...)
	s.Batches = append([]int(nil), s.Batches...)
	s.Acks = append([]uint64(nil), s.Acks...)
	s.Hellos = append([]*meshcav1.SyncHello(nil), s.Hellos...)
	s.Issued = make(map[spiffeid.ID]int, len(c.seen.Issued))
	for id, n := range c.seen.Issued {
		s.Issued[id] = n
	}
	return s
}

// Start serves at the address that it had before, or at any; it returns the address.
func (c *CA) Start() (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.address == "" {
		c.address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", c.address)
	if err != nil {
		return "", err
	}
	c.address = l.Addr().String()
	c.server = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.serving() },
		})),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	meshcav1.RegisterIssuanceServiceServer(c.server, &service{ca: c})
	go func(s *grpc.Server) { _ = s.Serve(l) }(c.server)
	return c.address, nil
}

// StartAt serves at an address that is known.
func (c *CA) StartAt(address string) error {
	c.with(func() { c.address = address })
	_, err := c.Start()
	return err
}

// Stop ends the server at once, as a crash would.
func (c *CA) Stop() {
	c.mu.Lock()
	server := c.server
	c.server = nil
	c.mu.Unlock()
	if server != nil {
		server.Stop()
	}
}

func (c *CA) with(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *CA) serving() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	leaf, err := c.root.sign(c.serverID, key.Public(), time.Now(), time.Hour)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

func newRoot(td spiffeid.TrustDomain) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: fmt.Sprintf("root %x", serial.Bytes()[:4])}, URIs: []*url.URL{td.ID().URL()},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key}, err
}

// sign makes a leaf that ends `life` after now.
func (a *authority) sign(id spiffeid.ID, public any, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{id.URL()},
		NotBefore: now.Add(-min(time.Minute, life/4)), NotAfter: now.Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b), nil
}
