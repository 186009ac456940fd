/* member ADDRESS GROUP PORT: joins an IPv4 group on the interface that has ADDRESS, says "joined", prints one datagram
 * that came to the group at PORT, and leaves; the guest's busybox has nothing that joins. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    struct ip_mreq group = {0};
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3]))};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (!inet_aton(argv[1], &group.imr_interface) || !inet_aton(argv[2], &group.imr_multiaddr))
        return 2;
    at.sin_addr = group.imr_multiaddr;
    if (bind(fd, (struct sockaddr *)&at, sizeof(at)) ||
        setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof(group))) {
        perror("member");
        return 1;
    }
    puts("joined");
    fflush(stdout);
    char got[2048];
    ssize_t n = recv(fd, got, sizeof(got), 0);
    printf("%.*s\n", (int)n, got);
    return n < 0;
}
