// Client is a workload of the shared socket, in a pod of its own: it asks for its SVID and prints what comes of it, a line
// each. Told to nest, it first moves into a control group below its own that is named like another pod's.
package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
)

const kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: client SOCKET [UID of the pod to nest as]")
		os.Exit(2)
	}
	if len(os.Args) == 3 {
		n, err := nest(os.Args[2])
		text, _ := os.ReadFile("/proc/self/cgroup")
		fmt.Printf("nested in %d hierarchies (%v): %q\n", n, err, text)
		if n == 0 {
			os.Exit(1)
		}
	}
	for {
		err := stream(os.Args[1])
		fmt.Println("ended", refusal.Of(err), err)
		time.Sleep(time.Second)
	}
}

func stream(socket string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	s, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	fmt.Println("connected")
	if err := s.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "client"}, ResourceNames: []string{"default"}, TypeUrl: kind}); err != nil {
		return err
	}
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		for _, resource := range r.GetResources() {
			id, err := identity(resource.GetValue())
			fmt.Println("served", id, err)
		}
		if err := s.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, TypeUrl: kind, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()}); err != nil {
			return err
		}
	}
}

// identity is the SPIFFE ID of a secret's certificate.
func identity(value []byte) (string, error) {
	var secret tlsv3.Secret
	if err := proto.Unmarshal(value, &secret); err != nil {
		return "", err
	}
	block, _ := pem.Decode(secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if block == nil {
		return "", errors.New("no certificate")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil || len(leaf.URIs) != 1 {
		return "", fmt.Errorf("%v, %w", leaf, err)
	}
	return leaf.URIs[0].String(), nil
}

// nest moves this process into /kubepods/burstable/podUID/CONTAINER below its own control group, in all hierarchies that let
// it, and returns in how many.
func nest(uid string) (n int, err error) {
	roots, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return 0, err
	}
	roots = append(roots, "/sys/fs/cgroup/cgroup.procs")
	var errs []error
	for _, procs := range roots {
		below := filepath.Join(filepath.Dir(procs), "kubepods", "burstable", "pod"+uid, strings.Repeat("0a", 32))
		err := os.MkdirAll(below, 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(below, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
		}
		if err == nil {
			n++
		}
		errs = append(errs, err)
	}
	return n, errors.Join(errs...)
}
