package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/sds"
)

// A certificate's signature ends in any byte, so also in one that looks like white space.
func TestReadCertificatesTakesDERAsItIs(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wanted := map[byte]bool{'\n': true, '\r': true, '\t': true, ' ': true}
	for i := 0; len(wanted) > 0 && i < 20000; i++ {
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		last := der[len(der)-1]
		if !wanted[last] {
			continue
		}
		delete(wanted, last)
		s, err := readCertificates(der)
		if err != nil || len(s.chain) != 1 || !bytes.Equal(s.chain[0].Raw, der) {
			t.Errorf("ends in %#02x: %v", last, err)
		}
	}
	if len(wanted) > 0 {
		t.Fatalf("no certificate ended in %v", wanted)
	}
}

// A workload that is pending or denied is served nothing, maybe for ever: without --timeout nobody waits for long.
func TestFetchDoesNotWaitForLong(t *testing.T) {
	dir, err := os.MkdirTemp("", "ctl") // short: a socket lies in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	engine, err := sds.New(sds.Config{Source: func(context.Context) (sds.Source, error) {
		return sds.SourceFunc(func() (*sds.Secrets, <-chan struct{}) { return nil, nil }), nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(server, engine)
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)

	for _, verb := range []string{"fetch", "inspect"} {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			var said strings.Builder
			c := &cli{in: strings.NewReader(""), out: &said, err: &said, now: time.Now}
			began := time.Now()
			if code := c.run(context.Background(), []string{"svid", verb, socket}); code != exitNo {
				t.Errorf("exit code %d", code)
			}
			if took := time.Since(began); took > 3*servedWithin/2 {
				t.Errorf("it took %v", took)
			}
			if !strings.Contains(said.String(), "certctl explain --agent") {
				t.Errorf("it says %q", said.String())
			}
		})
	}
}
