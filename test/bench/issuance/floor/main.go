// Command floor is what issuance cannot be faster than: an mTLS gRPC server that for each request verifies one RS256
// signature, parses and checks one CSR, and calls x509.CreateCertificate once. No policy, no ledger, no audit, no lint.
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"go.step.sm/crypto/pemutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// usage: floor CERT KEY ROOT TOKEN-KEY plain|tuned; it prints its address and serves until its input ends. Tuned, its
// collector is as the CA has it; plain, as Go has it.
func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5] == "tuned"); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

type floor struct {
	meshcav1.UnimplementedIssuanceServiceServer
	issuer *x509.Certificate
	key    *ecdsa.PrivateKey
	tokens *rsa.PublicKey
}

func run(certFile, keyFile, rootFile, tokenKeyFile string, tuned bool) error {
	if tuned {
		debug.SetGCPercent(400)
		ballast := make([]byte, 16<<20)
		defer runtime.KeepAlive(ballast)
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	root, err := pemutil.ReadCertificate(rootFile)
	if err != nil {
		return err
	}
	read, err := pemutil.Read(tokenKeyFile)
	if err != nil {
		return err
	}
	tokenKey, ok := read.(*rsa.PrivateKey)
	if !ok {
		return fmt.Errorf("%s holds a %T", tokenKeyFile, read)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	f := &floor{issuer: cert.Leaf, key: cert.PrivateKey.(*ecdsa.PrivateKey), tokens: &tokenKey.PublicKey}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	})))
	meshcav1.RegisterIssuanceServiceServer(server, f)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1)) // the parent's death closes it
		server.Stop()
	}()
	return server.Serve(l)
}

// IssueX509SVIDs signs each request on all cores.
func (f *floor) IssueX509SVIDs(_ context.Context, r *meshcav1.IssueX509SVIDsRequest) (*meshcav1.IssueX509SVIDsResponse, error) {
	results := make([]*meshcav1.X509SVIDResult, len(r.GetRequests()))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, item := range r.GetRequests() {
		if len(results) == 1 {
			der, err := f.issue(item)
			if err != nil {
				return nil, err
			}
			results[0] = answer(der)
			break
		}
		g.Go(func() error {
			der, err := f.issue(item)
			results[i] = answer(der)
			return err
		})
	}
	return &meshcav1.IssueX509SVIDsResponse{Results: results}, g.Wait()
}

func answer(der []byte) *meshcav1.X509SVIDResult {
	return &meshcav1.X509SVIDResult{Result: &meshcav1.X509SVIDResult_Svid{Svid: &meshcav1.X509SVID{Chain: [][]byte{der}}}}
}

func (f *floor) issue(r *meshcav1.X509SVIDRequest) ([]byte, error) {
	signed, signature, ok := cutLast(r.GetToken())
	if !ok {
		return nil, errors.New("no token")
	}
	raw, err := base64.RawURLEncoding.DecodeString(signature)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(signed))
	if err := rsa.VerifyPKCS1v15(f.tokens, crypto.SHA256, sum[:], raw); err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	serial := make([]byte, 16)
	_, _ = rand.Read(serial)
	now := time.Now()
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(6 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "mesh.test", Path: "/ns/shop/sa/web"}},
	}, f.issuer, csr.PublicKey, f.key)
}

func cutLast(token string) (before, after string, found bool) {
	i := strings.LastIndexByte(token, '.')
	if i < 0 {
		return "", "", false
	}
	return token[:i], token[i+1:], true
}
