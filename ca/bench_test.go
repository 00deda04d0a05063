package ca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/store/bolt"
)

// waiters is the concurrency at which the CA is measured: 32 warm connections.
const waiters = 32

// spread runs fn b.N times from 32 goroutines.
func spread(b *testing.B, fn func() error) {
	b.ReportAllocs()
	var wg sync.WaitGroup
	work := make(chan struct{}, b.N)
	for range b.N {
		work <- struct{}{}
	}
	close(work)
	b.ResetTimer()
	for range waiters {
		wg.Go(func() {
			for range work {
				if err := fn(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
}

var evidence = []byte(`{"method":"kubernetes/jwks","door":"issuance","cluster":"prod","namespace":"shop","serviceAccount":"cart","serviceAccountUID":"6d1b4c3e-92a7-4f51-8b6d-1f0f5a0c7d3e","pod":"cart-7d4b9c6f5-x2x7k","podUID":"0b0f6d6a-5c1e-4a3e-9a53-6f6a0e8d2c11","node":"node-17","nodeUID":"a7d3e5f1-2b4c-4d6e-8f90-123456789abc"}`)

// BenchmarkIssue is to be read as a ratio to BenchmarkFloor in the same run.
func BenchmarkIssue(b *testing.B) {
	h := open(b, b.TempDir())
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	r := ca.Request{
		Grant:     ca.Grant{ID: spiffeid.RequireFromPath(domain, "/ns/shop/sa/cart"), TTL: 6 * time.Hour},
		PublicKey: key.Public(),
		Evidence:  evidence,
	}
	spread(b, func() error {
		_, err := h.issuer.Issue(context.Background(), r)
		return err
	})
}

// BenchmarkFloor is x509.CreateCertificate and the parsing of its result.
func BenchmarkFloor(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now, NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: make([]byte, 20)}
	id := spiffeid.RequireFromPath(domain, "/ns/shop/sa/cart").URL()
	spread(b, func() error {
		var serial [16]byte
		if _, err := rand.Read(serial[:]); err != nil {
			return err
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: new(big.Int).SetBytes(serial[:]), NotBefore: now, NotAfter: now.Add(time.Hour),
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			URIs:        []*url.URL{id}, SubjectKeyId: make([]byte, 20), BasicConstraintsValid: true,
		}, parent, key.Public(), key)
		if err != nil {
			return err
		}
		_, err = x509.ParseCertificate(der)
		return err
	})
}

// BenchmarkSequencer is the ledger alone: 32 who wait for durable commits.
func BenchmarkSequencer(b *testing.B) {
	dir := b.TempDir()
	store, err := bolt.Open(filepath.Join(dir, "meshca.db"))
	if err != nil {
		b.Fatal(err)
	}
	var mu sync.Mutex
	commits, entries := 0, 0
	ledger, err := ca.NewSequencer(ca.SequencerConfig{Store: store, Observe: func(n int, _ time.Duration, _ error) {
		mu.Lock()
		defer mu.Unlock()
		commits, entries = commits+1, entries+n
	}})
	if err != nil {
		b.Fatal(err)
	}
	e := ca.LedgerEntry{
		Serial: make([]byte, 16), ID: "spiffe://example.org/ns/shop/sa/cart", Profile: "workload", AuthorityKeyID: make([]byte, 20),
		TBSDigest: make([]byte, 32), Evidence: evidence, IssuedAt: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}
	spread(b, func() error { return ledger.Append(context.Background(), e) })
	ledger.Close()
	if err := store.Close(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(entries)/float64(commits), "entries/commit")
}

// BenchmarkParseCSR and the check against the grant.
func BenchmarkParseCSR(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	id := spiffeid.RequireFromPath(domain, "/ns/shop/sa/cart")
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}}, key)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		csr, err := ca.ParseCSR(der)
		if err != nil {
			b.Fatal(err)
		}
		if err := csr.WithinGrant(ca.Grant{ID: id}); err != nil {
			b.Fatal(err)
		}
	}
}
